//! The head: from states to logits. All of them, or provably the largest ones at a fraction of the bytes.
//!
//! A vocabulary of 128,000 makes the head's rows more than the rest of a small model, and most logits are of no interest:
//! a sampler wants the largest. So rows also exist as integers of a few bits with a scale each (the *screen*), and a state as 14
//! bits with a scale. One pass over the screen gives an interval for every logit; the rows whose interval reaches above what is surely exceeded often enough are then
//! computed from the file's own rows, in the one fixed order. What is returned has the bits of the full head. Where a token
//! is drawn at random it is the largest of other numbers, logits with noise ([`Draw`]), whose intervals are as good.
//!
//! **The bound.** Let `x` be the state and `x = t·p + d` its integer form, `w` a row and `w = s·q + e` its own. The estimate
//! is `t·s·(p·q)`, an exact integer but for two products in `f64`. Then `x·w − t·s·(p·q) = x·e + d·(s·q)`, at most
//! `‖x‖·‖e‖ + ‖d‖·s·‖q‖` by Cauchy-Schwarz. The logit is a sum as it is rounded: sixteen lanes of fused multiply-adds and
//! one tree, so at most `n = ⌈k/16⌉ + 4` roundings on the way of each product, hence within `γₙ·‖x‖·‖w‖` of `x·w`,
//! `γₙ = n·u / (1 − n·u)`, `u = 2⁻²⁴` (Higham, *Accuracy and Stability of Numerical Algorithms*, 3.1), plus `n` of the
//! smallest subnormals per lane where products underflow. Norms are computed in `f64` and enlarged by more than their own
//! rounding.

use ternion_kernels_ref::lanes::LANES;
use ternion_tuner::Workers;

use super::Draw;
use crate::formats::FloatMatrix;
use crate::ops::{self, SCREEN_BLOCK as BLOCK, SCREEN_ROWS, SCREEN_STEP, SLACK, ScreenState, StateBounds};
use crate::screen::{Screen, roundings};
use crate::team::{PART_BYTES, SharedSlice, Team};

/// States that one pass over a block serves.
const STATES: usize = 8;
/// Partial sums below this do not overflow, however they are rounded.
const LARGEST: f64 = 1e38;
/// A head of at least this many bytes is screened: a smaller one stays in a cache, where bytes cost little.
const SCREENED: usize = 32 << 20;

/// Which logits are of interest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// All.
    All,
    /// The `k` largest.
    Top(usize),
    /// Those that are at most this much below the largest.
    Within(f32),
    /// That of the token which is drawn from all.
    Drawn(Draw),
}

/// A logit and its token.
pub type Candidate = (f32, u32);

/// A state whose logits are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The final norm's output, `[hidden]`.
    pub state: &'a [f32],
    /// What is of interest about it.
    pub wanted: Wanted,
    /// Tokens whose logits are wanted in any case, in rising order, because a penalty will change them; `wanted` is
    /// about the others then.
    pub always: &'a [u32],
}

/// What [`Head::candidates`] needs on its way; grows to its size with the first use.
#[derive(Debug, Default)]
pub struct HeadScratch {
    /// What bounds need to know of the states; `None` for one that is not screened.
    forms: Vec<Option<Form>>,
    /// The states' integers, `[n, steps]`, and the sums of each.
    integers: Vec<ScreenState>,
    totals: Vec<i32>,
    /// Lower and upper ends of the intervals of logits, or of scores where a token is drawn, `[n, vocabulary]` each.
    lower: Vec<f32>,
    upper: Vec<f32>,
    /// The largest lower and the largest upper end of each block, `[n, blocks]`: what most questions are answered from.
    tops: Vec<Tops>,
    /// Lower ends of one state's intervals, to be put in order.
    ends: Vec<f32>,
    /// States that are not screened, `[n, hidden]`, and their logits, `[n, vocabulary]`.
    states: Vec<f32>,
    logits: Vec<f32>,
}

/// The rows of the head, `[vocabulary, hidden]`.
#[derive(Debug)]
pub struct Head {
    rows: FloatMatrix,
    screen: Option<Screen>,
}

impl Head {
    /// A head of these rows, screened if that pays.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(rows: FloatMatrix, workers: &dyn Workers) -> std::io::Result<Self> {
        let screened = Self::is_screened(rows.bytes.len());
        Self::with_screen(rows, screened, workers)
    }

    /// A head of these rows, screened or not. Nothing but speed depends on it.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn with_screen(rows: FloatMatrix, screened: bool, workers: &dyn Workers) -> std::io::Result<Self> {
        let screen = if screened { Some(Screen::new(&rows, workers)?) } else { None };
        Ok(Self { rows, screen })
    }

    /// A head of these rows with the screen that was made of them before.
    pub(super) fn with_stored(rows: FloatMatrix, screen: Screen) -> Self {
        Self { rows, screen: Some(screen) }
    }

    /// Whether screening a head of this many bytes pays.
    pub(super) const fn is_screened(bytes: usize) -> bool {
        bytes >= SCREENED
    }

    /// Bytes of memory beside the rows themselves.
    #[must_use]
    pub fn screen_bytes(&self) -> usize {
        self.screen.as_ref().map_or(0, Screen::len)
    }

    /// Those of them that a file had as they are.
    #[must_use]
    pub fn stored_screen_bytes(&self) -> usize {
        self.screen.as_ref().filter(|screen| screen.is_stored()).map_or(0, Screen::len)
    }

    /// All logits of some states: `states` is `[n, hidden]`, `logits` `[n, vocabulary]`.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn logits(&self, team: &Team, states: &[f32], logits: &mut [f32]) {
        let (hidden, vocabulary) = (self.rows.columns, self.rows.rows);
        assert_eq!(states.len() / hidden * vocabulary, logits.len(), "logits: one row per state");
        let shared = SharedSlice::new(logits);
        self.each_block(team, &|rows| {
            let mut wide = Vec::new();
            let (dtype, bytes) = self.rows.plain_rows(rows.clone(), &mut wide);
            for (n, state) in states.chunks_exact(hidden).enumerate() {
                let at = n * vocabulary;
                // SAFETY: every block of rows is in one part of the work.
                let target = unsafe { shared.part(at + rows.start..at + rows.end) };
                ops::dot_rows(state, dtype, bytes, target);
            }
        });
    }

    /// The logits that are wanted, in rising order of their tokens, into one list per query. There may be others among
    /// them; none that is wanted is missing, and every one has the bits that [`logits`](Self::logits) gives it.
    ///
    /// # Panics
    /// If there are not as many lists as queries, or a state does not have the width of the head.
    pub fn candidates<'a>(
        &self,
        team: &Team,
        queries: impl ExactSizeIterator<Item = Query<'a>> + Clone + Sync,
        scratch: &mut HeadScratch,
        found: &mut [Vec<Candidate>],
    ) {
        assert_eq!(queries.len(), found.len(), "candidates: a list per query");
        let vocabulary = self.rows.rows;
        let screen = self.screen.as_ref();
        scratch.forms.clear();
        scratch.totals.clear();
        let steps = self.rows.columns.div_ceil(SCREEN_STEP);
        scratch.integers.resize(queries.len() * steps, ScreenState::ZERO);
        for (query, integers) in queries.clone().zip(scratch.integers.chunks_exact_mut(steps.max(1))) {
            let screened = screen.is_some() && query.wanted != Wanted::All;
            let draw = if let Wanted::Drawn(draw) = query.wanted { Some(draw) } else { None };
            let form = screened.then(|| Form::new(query.state, draw, integers)).flatten();
            scratch.totals.push(form.map_or(0, |(_, total)| total));
            scratch.forms.push(form.map(|(form, _)| form));
        }
        if let Some(screen) = screen.filter(|_| scratch.forms.iter().any(Option::is_some)) {
            self.intervals(team, screen, scratch);
        }
        // All that are not screened share one reading of the rows.
        scratch.states.clear();
        for (query, _) in queries.clone().zip(&scratch.forms).filter(|(_, form)| form.is_none()) {
            scratch.states.extend_from_slice(query.state);
        }
        scratch.logits.resize(scratch.states.len() / self.rows.columns * vocabulary, 0.0);
        if !scratch.states.is_empty() {
            self.logits(team, &scratch.states, &mut scratch.logits);
        }
        let mut logits = scratch.logits.chunks_exact(vocabulary);
        for (n, (query, found)) in queries.zip(found).enumerate() {
            found.clear();
            if scratch.forms[n].is_none() {
                found.extend(logits.next().into_iter().flatten().copied().zip(0..));
                continue;
            }
            let (range, blocks) = (n * vocabulary..(n + 1) * vocabulary, vocabulary.div_ceil(BLOCK));
            let (lower, upper) = (&mut scratch.lower[range.clone()], &mut scratch.upper[range]);
            let tops = &mut scratch.tops[n * blocks..][..blocks];
            // What is computed in any case neither sets the threshold nor has to reach it.
            for token in query.always.iter().map(|token| *token as usize).filter(|token| *token < vocabulary) {
                (lower[token], upper[token]) = (f32::NEG_INFINITY, f32::INFINITY);
                let block = token / BLOCK * BLOCK..vocabulary.min((token / BLOCK + 1) * BLOCK);
                tops[token / BLOCK] = Tops::new(&lower[block.clone()], &upper[block]);
            }
            let threshold = threshold(query.wanted, lower, tops, &mut scratch.ends);
            for (block, _) in tops.iter().enumerate().filter(|(_, tops)| tops.upper >= threshold) {
                let first = block * BLOCK;
                let upper = upper[first..].iter().take(BLOCK).zip(first as u32..);
                found.extend(upper.filter(|(upper, _)| **upper >= threshold).map(|(_, token)| (0.0, token)));
            }
            self.rescore(team, query.state, found);
        }
    }

    /// Intervals of all logits or scores of the states that are screened.
    fn intervals(&self, team: &Team, screen: &Screen, scratch: &mut HeadScratch) {
        let HeadScratch { forms, integers, totals, lower, upper, tops, .. } = scratch;
        let (vocabulary, steps) = (self.rows.rows, self.rows.columns.div_ceil(SCREEN_STEP));
        lower.resize(forms.len() * vocabulary, 0.0);
        upper.resize(forms.len() * vocabulary, 0.0);
        let blocks = vocabulary.div_ceil(BLOCK);
        tops.resize(forms.len() * blocks, Tops::default());
        let (lower, upper, tops) = (SharedSlice::new(lower), SharedSlice::new(upper), SharedSlice::new(tops));
        self.each_block(team, &|rows| {
            let mut sums = [[0; SCREEN_ROWS]; STATES * BLOCK / SCREEN_ROWS];
            let ((tiles, bounds), of_tiles) = (screen.block(&rows), rows.len().div_ceil(SCREEN_ROWS));
            let groups = forms.chunks(STATES).zip(integers.chunks(STATES * steps).zip(totals.chunks(STATES)));
            for (group, (forms, (integers, totals))) in groups.enumerate() {
                let sums = &mut sums[..forms.len() * of_tiles];
                ops::dot_screen(screen.bits(), integers, totals, tiles, sums);
                for (n, (form, sums)) in forms.iter().zip(sums.chunks(of_tiles)).enumerate() {
                    let Some(form) = form else { continue };
                    let (at, block) =
                        ((group * STATES + n) * vocabulary, (group * STATES + n) * blocks + rows.start / BLOCK);
                    let range = at + rows.start..at + rows.end;
                    // SAFETY: every block of rows is in one part of the work.
                    let (lower, upper, tops) =
                        unsafe { (lower.part(range.clone()), upper.part(range), tops.part(block..block + 1)) };
                    ops::intervals(&form.bounds, sums, bounds, lower, upper);
                    if let Some(draw) = form.draw {
                        draw.perturb(rows.start, lower, upper);
                    }
                    tops[0] = Tops::new(lower, upper);
                }
            }
        });
    }

    /// Fills in the logits of some tokens.
    fn rescore(&self, team: &Team, state: &[f32], found: &mut [Candidate]) {
        let (row_bytes, count) = (self.rows.row_bytes(), found.len());
        let shared = SharedSlice::new(found);
        let rescore = |candidates: std::ops::Range<usize>| {
            // SAFETY: every candidate is in one part of the work.
            for (logit, token) in unsafe { shared.part(candidates) } {
                let bytes = &self.rows.bytes[*token as usize * row_bytes..][..row_bytes];
                ops::dot_rows(state, self.rows.dtype, bytes, std::array::from_mut(logit));
            }
        };
        // Waking the others takes longer than a few rows.
        if count < 4 * BLOCK {
            return rescore(0..count);
        }
        team.share_out(count, BLOCK, &rescore);
    }

    /// Calls `work` for every block of rows, sharing them among the team.
    fn each_block(&self, team: &Team, work: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        let rows = self.rows.rows;
        let block_bytes = BLOCK * self.rows.columns;
        team.share_out(rows.div_ceil(BLOCK), PART_BYTES / block_bytes.max(1), &|blocks| {
            for block in blocks {
                work(block * BLOCK..rows.min((block + 1) * BLOCK));
            }
        });
    }
}

/// The largest ends of a block's intervals.
#[derive(Clone, Copy, Debug, Default)]
struct Tops {
    lower: f32,
    upper: f32,
}

impl Tops {
    fn new(lower: &[f32], upper: &[f32]) -> Self {
        Self { lower: ops::largest(lower), upper: ops::largest(upper) }
    }
}

/// A value that as many lower ends reach as are wanted, so that whatever is wanted reaches it too.
fn threshold(wanted: Wanted, lower: &[f32], tops: &[Tops], order: &mut Vec<f32>) -> f32 {
    let largest = || tops.iter().fold(f32::NEG_INFINITY, |largest, tops| largest.max(tops.lower));
    match wanted {
        Wanted::All => f32::NEG_INFINITY,
        Wanted::Top(1) | Wanted::Drawn(_) => largest(),
        Wanted::Top(k) if k == 0 || k > lower.len() => f32::NEG_INFINITY,
        Wanted::Top(k) => {
            order.clear();
            // So many blocks have one each.
            if k <= tops.len() {
                order.extend(tops.iter().map(|tops| tops.lower));
            } else {
                order.extend_from_slice(lower);
            }
            *order.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
        }
        Wanted::Within(distance) => (largest() - distance).next_down(),
    }
}

/// A state's integer form.
#[derive(Clone, Copy, Debug)]
struct Form {
    bounds: StateBounds,
    /// How a token is drawn, if one is.
    draw: Option<Draw>,
}

impl Form {
    /// Writes a state's integers, and returns their sum besides; `None` if it cannot be screened: bounds need every element
    /// to be a number, and squares that do not overflow.
    fn new(state: &[f32], draw: Option<Draw>, integers: &mut [ScreenState]) -> Option<(Self, i32)> {
        let k = state.len();
        let form = ops::screen_state(state, integers)?;
        let [norm, error] = [form.whole, form.error].map(|squares| squares.sqrt() * SLACK);
        let bounds = StateBounds {
            scale: f64::from(form.scale),
            norm,
            error,
            // The logit's partial sums are at most `‖x‖·√k` times the largest element of a row, which is at most 127 scales.
            largest: LARGEST / (127.0 * norm * (k as f64).sqrt()),
            underflow: roundings(k) * LANES as f64 * f64::from(f32::from_bits(1)),
        };
        norm.is_finite().then_some((Self { bounds, draw }, form.total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::FloatType;
    use crate::ops::f32_to_f16;
    use proptest::prelude::*;

    const HIDDEN: usize = 48;

    fn matrix(dtype: FloatType, rows: &[Vec<f32>]) -> FloatMatrix {
        let bytes: Vec<u8> = rows
            .iter()
            .flatten()
            .flat_map(|w| match dtype {
                FloatType::F32 => w.to_le_bytes().to_vec(),
                FloatType::F16 => f32_to_f16(*w).to_le_bytes().to_vec(),
                FloatType::Bf16 => ((w.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
            })
            .collect();
        FloatMatrix { rows: rows.len(), columns: rows[0].len(), dtype: dtype.into(), bytes: bytes.into() }
    }

    /// Full logits, and candidates with and without a screen.
    fn both(
        dtype: FloatType,
        rows: &[Vec<f32>],
        states: &[Vec<f32>],
        wanted: Wanted,
        always: &[u32],
    ) -> (Vec<Vec<f32>>, Vec<Vec<Candidate>>) {
        let team = Team::new(2).unwrap();
        let head = Head::with_screen(matrix(dtype, rows), true, &team).unwrap();
        let logits = states.iter().map(|state| {
            let mut logits = vec![0.0; rows.len()];
            head.logits(&team, state, &mut logits);
            logits
        });
        let logits = logits.collect();
        let queries = states.iter().map(|state| Query { state, wanted, always });
        let mut found = vec![Vec::new(); states.len()];
        head.candidates(&team, queries, &mut HeadScratch::default(), &mut found);
        (logits, found)
    }

    /// That nothing that is wanted is missing, and that nothing is other than in the full head.
    fn assert_complete(logits: &[f32], found: &[Candidate], wanted: Wanted, always: &[u32]) {
        assert!(found.windows(2).all(|pair| pair[0].1 < pair[1].1), "in order of tokens");
        for (logit, token) in found {
            assert_eq!(logit.to_bits(), logits[*token as usize].to_bits(), "token {token}");
        }
        let is_found = |token: usize| found.binary_search_by_key(&(token as u32), |candidate| candidate.1).is_ok();
        assert!(always.iter().all(|token| is_found(*token as usize)));
        let mut others: Vec<_> = (0..logits.len()).filter(|token| !always.contains(&(*token as u32))).collect();
        others.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let Some(largest) = others.first().map(|token| logits[*token]) else { return };
        let drawn = match wanted {
            Wanted::Drawn(draw) => {
                draw.choose(&others.iter().map(|token| (logits[*token], *token as u32)).collect::<Vec<_>>())
            }
            _ => None,
        };
        let is_wanted = |rank: usize, token: usize| match wanted {
            Wanted::All => true,
            // Whatever ties with the k-th is wanted as well: the lower id wins.
            Wanted::Top(k) => rank < k || logits[token] == logits[others[k - 1]],
            Wanted::Within(distance) => logits[token] >= largest - distance,
            Wanted::Drawn(_) => drawn == Some(token as u32),
        };
        for (rank, token) in others.iter().enumerate() {
            assert!(!is_wanted(rank, *token) || is_found(*token), "{wanted:?}: token {token} is missing");
        }
    }

    fn wanted() -> impl Strategy<Value = Wanted> {
        let draw = (any::<u64>(), 0usize..9, -10i32..7).prop_map(|(seed, at, t)| Draw::new(seed, 0, at, 2f32.powi(t)));
        prop_oneof![
            Just(Wanted::All),
            (1usize..60).prop_map(Wanted::Top),
            (0f32..5.0).prop_map(Wanted::Within),
            draw.prop_map(Wanted::Drawn)
        ]
    }

    fn state() -> impl Strategy<Value = Vec<f32>> {
        (prop::collection::vec(-1f32..1.0, HIDDEN), -20i32..20)
            .prop_map(|(state, e)| state.into_iter().map(|x| x * 2f32.powi(e)).collect())
    }

    fn dtype() -> impl Strategy<Value = FloatType> {
        prop::sample::select(vec![FloatType::F32, FloatType::F16, FloatType::Bf16])
    }

    proptest! {
        #[test]
        fn nothing_wanted_is_missing_among_random_rows(
            dtype in dtype(), states in prop::collection::vec(state(), 1..4), wanted in wanted(),
            rows in prop::collection::vec(prop::collection::vec(-2f32..2.0, HIDDEN), 1..100),
            always in prop::collection::btree_set(0u32..40, 0..5),
        ) {
            let always: Vec<u32> = always.into_iter().filter(|token| (*token as usize) < rows.len()).collect();
            let (logits, found) = both(dtype, &rows, &states, wanted, &always);
            for (logits, found) in logits.iter().zip(&found) {
                assert_complete(logits, found, wanted, &always);
            }
        }

        #[test]
        fn nothing_wanted_is_missing_among_near_ties(
            dtype in dtype(), state in state(), wanted in wanted(), base in prop::collection::vec(-2f32..2.0, HIDDEN),
            nudges in prop::collection::vec((0usize..HIDDEN, -3i32..4), 40), scale in -30i32..30,
        ) {
            // All rows are one row but for a few units in the last place of one element: their logits differ by less
            // than the screen can tell.
            let rows: Vec<Vec<f32>> = nudges.iter().map(|(at, steps)| {
                let mut row: Vec<f32> = base.iter().map(|w| w * 2f32.powi(scale)).collect();
                row[*at] = f32::from_bits(row[*at].to_bits().wrapping_add_signed(*steps << 13));
                row
            }).collect();
            prop_assume!(rows.iter().flatten().all(|w| w.is_finite()));
            let (logits, found) = both(dtype, &rows, &[state], wanted, &[]);
            prop_assume!(logits[0].iter().all(|logit| logit.is_finite()));
            assert_complete(&logits[0], &found[0], wanted, &[]);
        }
    }

    #[test]
    fn a_screen_leaves_few_candidates_and_so_saves_something() {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut rows: Vec<Vec<f32>> = (0..2000).map(|_| (0..256).map(|_| next()).collect()).collect();
        let state: Vec<f32> = (0..256).map(|_| 0.3 * next()).collect();
        rows[77] = state.iter().map(|x| 2.5 * x).collect();
        let assert_few = |wanted: Wanted, few: usize| {
            let (logits, found) = both(FloatType::Bf16, &rows, std::slice::from_ref(&state), wanted, &[]);
            assert_complete(&logits[0], &found[0], wanted, &[]);
            assert!(found[0].len() <= few, "{wanted:?}: {}", found[0].len());
        };
        assert_few(Wanted::Top(1), 1);
        // The noise of these is large, so that any of hundreds of tokens may be drawn.
        for position in 0..20 {
            assert_few(Wanted::Drawn(Draw::new(0, 0, position, 1.0)), 20);
        }
    }

    #[test]
    fn rows_and_states_that_are_no_numbers_are_not_screened_away() {
        let plain = |x: f32| vec![x; HIDDEN];
        for strange in [f32::NAN, f32::INFINITY, 3e38] {
            let rows = [plain(0.5), plain(strange), plain(0.25)];
            for state in [plain(1.0), plain(-1.0)] {
                let (_, found) = both(FloatType::F32, &rows, &[state], Wanted::Top(1), &[]);
                assert!(found[0].iter().any(|candidate| candidate.1 == 1), "{strange}");
            }
            let (_, found) = both(FloatType::F32, &[plain(0.5), plain(0.25)], &[plain(strange)], Wanted::Top(1), &[]);
            assert!(!found[0].is_empty(), "{strange}");
        }
        let (logits, found) = both(FloatType::F32, &[plain(0.0), plain(0.0)], &[plain(0.0)], Wanted::Top(1), &[]);
        assert_complete(&logits[0], &found[0], Wanted::Top(1), &[]);
        assert_eq!(found[0].len(), 2);
    }
}

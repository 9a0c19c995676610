//! Random weights, fast: sixteen random bits pick one of 65536 prepared outcomes.

use half::bf16;
use ternion_kernels_ref::SplitMix64;

/// What tables have entries for.
const ENTRIES: usize = 1 << 16;

/// Random words. Any seed is as good as any other, so every row has its own.
pub(super) struct Random(SplitMix64);

impl Random {
    /// The words of `row` of part `part` of the model that `seed` makes.
    pub(super) fn new(seed: u64, part: u64, row: usize) -> Self {
        let mix = |seed, word: u64| SplitMix64::new(seed).next_u64() ^ word.wrapping_mul(0xd6e8_feb8_6659_fd93);
        Self(SplitMix64::new(mix(mix(seed, part), row as u64)))
    }

    /// Sixteen bits at a time, as places in a table.
    fn places(&mut self) -> [usize; 4] {
        let word = self.0.next_u64();
        [0, 16, 32, 48].map(|shift| (word >> shift) as usize & (ENTRIES - 1))
    }
}

/// Packed bytes of four trits, as often as the trits' probabilities ask for.
pub(super) struct TritTable(Vec<u8>);

impl TritTable {
    /// Probabilities of −1, 0 and 1; they add up to 1.
    pub(super) fn new(probabilities: [f64; 3]) -> Self {
        let mut table = Vec::with_capacity(ENTRIES);
        let mut sum = 0.0;
        for combination in 0..81 {
            let codes = [27, 9, 3, 1].map(|power| combination / power % 3);
            sum += codes.iter().map(|code| probabilities[*code]).product::<f64>();
            let byte = codes.iter().enumerate().fold(0, |byte, (place, code)| byte | code << (2 * place));
            table.resize(((sum * ENTRIES as f64).round() as usize).min(ENTRIES), byte as u8);
        }
        // Sums of rounded probabilities may end a little below 1.
        table.resize(ENTRIES, table.last().copied().unwrap_or(0));
        Self(table)
    }

    /// Fills packed bytes.
    pub(super) fn fill(&self, random: &mut Random, bytes: &mut [u8]) {
        for bytes in bytes.chunks_mut(4) {
            for (byte, place) in bytes.iter_mut().zip(random.places()) {
                *byte = self.0[place];
            }
        }
    }
}

/// Normally distributed bf16 values.
pub(super) struct NormalTable(Vec<u16>);

impl NormalTable {
    pub(super) fn new(deviation: f64) -> Self {
        let value = |place: usize| deviation * normal_quantile((place as f64 + 0.5) / ENTRIES as f64);
        Self((0..ENTRIES).map(|place| bf16::from_f64(value(place)).to_bits()).collect())
    }

    /// Fills little-endian values.
    pub(super) fn fill(&self, random: &mut Random, bytes: &mut [u8]) {
        for bytes in bytes.chunks_mut(8) {
            for (value, place) in bytes.chunks_exact_mut(2).zip(random.places()) {
                value.copy_from_slice(&self.0[place].to_le_bytes());
            }
        }
    }
}

/// The value below which a normally distributed number lies with probability `p`, 0 < p < 1: by bisection of
/// `erfc(−x/√2) / 2`, precise to some 1e-12.
pub(super) fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-9.0, 9.0);
    for _ in 0..44 {
        let middle = (low + high) / 2.0;
        if libm::erfc(-middle * std::f64::consts::FRAC_1_SQRT_2) / 2.0 < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trits_come_as_often_as_they_should() {
        let mut bytes = vec![0; 40_000];
        TritTable::new([0.2, 0.45, 0.35]).fill(&mut Random::new(1, 2, 3), &mut bytes);
        let count = |code: u8| {
            bytes.iter().flat_map(|byte| (0..4).map(move |j| byte >> (2 * j) & 3)).filter(|c| *c == code).count()
        };
        for (code, share) in [(0, 0.2), (1, 0.45), (2, 0.35), (3, 0.0)] {
            assert!((count(code) as f64 / 160_000.0 - share).abs() < 0.005, "{code}: {}", count(code));
        }
    }

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (p, x) in [(0.5, 0.0), (0.8, 0.841_621_233_572_914_3), (0.025, -1.959_963_984_540_054)] {
            assert!((normal_quantile(p) - x).abs() < 1e-9, "{p}");
        }
    }

    #[test]
    fn rows_and_parts_differ() {
        let first = |part, row| Random::new(7, part, row).places();
        assert_ne!(first(0, 1), first(1, 0));
        assert_ne!(first(0, 0), first(0, 1));
        assert_eq!(first(3, 4), first(3, 4));
    }
}

use super::*;
use crate::stopwatch::scripted::{Noise, ScriptedStopwatch};

/// Eight entrants over three layouts as a short race has them; entrant 4 belongs to the fastest pair, (4, 5).
struct Script {
    entrants: Vec<Entrant>,
    /// True time of each, in microseconds.
    times: [f64; 8],
}

const WINNERS: [usize; 2] = [4, 5];

fn script() -> Script {
    // Which schedules they are does not matter here, only which of them share a layout.
    let schedule = |columns, layout: usize, nth: usize| {
        let layout = ["rows8x16", "rows4x16", "rows8x32", "rows4x32"][layout];
        let unroll = [1, 2, 4][nth];
        let text = format!("mad/clif128 layout={layout} multiply=pairs unroll={unroll} ntile=1");
        Entrant { class: columns, schedule: text.parse().unwrap() }
    };
    let (one, many) = (Class::One, Class::Batch);
    let entrants = vec![
        schedule(one, 0, 0),
        schedule(many, 0, 0),
        schedule(one, 1, 0),
        schedule(many, 1, 0),
        schedule(one, 2, 0),
        schedule(many, 2, 0),
        schedule(one, 0, 1),
        schedule(one, 1, 1),
    ];
    // The pair (4, 5) is a tenth faster than the next best; entrant 3 is the fastest of its class, with slow company.
    let times = [300.0, 600.0, 340.0, 500.0, 270.0, 540.0, 320.0, 360.0];
    Script { entrants, times }
}

fn winners(verdict: &Verdict) -> Vec<usize> {
    verdict.one_copy.winners().collect()
}

/// Runs the script with a budget of 75 ms, what one of four shapes has in a short race, minus its compiling.
fn run(script: &Script, distort: &mut dyn FnMut(usize, f64, usize) -> f64) -> (Option<Verdict>, Duration) {
    run_for(script, Duration::from_millis(45), distort)
}

/// `distort(entrant, part of the time gone, samples taken)` multiplies a true time.
fn run_for(
    script: &Script,
    deadline: Duration,
    distort: &mut dyn FnMut(usize, f64, usize) -> f64,
) -> (Option<Verdict>, Duration) {
    let clock = ScriptedStopwatch::default();
    let mut taken = 0;
    let mut sample = |entrant: usize| {
        let gone = clock.elapsed().as_secs_f64() / deadline.as_secs_f64();
        let time = Duration::from_secs_f64(script.times[entrant] * distort(entrant, gone, taken) * 1e-6);
        taken += 1;
        clock.advance(time);
        Some(time)
    };
    let rules = Rules { weights: [1.0, 0.0, 0.0, 0.5 / 32.0, 0.0, 0.0], two_copies: false };
    let verdict = contest(&script.entrants, rules, &clock, deadline, &mut sample, &mut |_| {});
    (verdict, clock.elapsed())
}

/// Runs per scenario, and where their seeds begin: nothing about a contest was fitted to these.
const RUNS: u64 = 1000;
const FIRST_SEED: u64 = 0x5eed_0000 + 1000;

/// What must win of every thousand runs.
const ENOUGH: usize = 990;

fn wins_of(distort: impl Fn(usize, f64, usize, &mut Noise) -> f64) -> usize {
    let script = script();
    let run = |seed| {
        let mut noise = Noise::new(seed);
        let (verdict, _) = run(&script, &mut |entrant, gone, taken| distort(entrant, gone, taken, &mut noise));
        verdict.is_some_and(|verdict| winners(&verdict) == WINNERS)
    };
    (FIRST_SEED..FIRST_SEED + RUNS).filter(|seed| run(*seed)).count()
}

#[test]
fn the_pace_of_who_has_retired_is_that_of_the_rounds_that_it_ran() {
    let script = script();
    // The machine gets slower all the time, to half its speed.
    let (verdict, _) = run_for(&script, Duration::from_millis(400), &mut |_, gone, _| 1.0 + gone);
    let verdict = verdict.unwrap();
    assert_eq!(winners(&verdict), WINNERS);
    for entrant in 0..8 {
        let winner = if script.entrants[entrant].class == Class::One { 4 } else { 5 };
        let pace = script.times[entrant] / script.times[winner];
        assert!((verdict.paces[entrant] / pace - 1.0).abs() < 0.02, "{entrant}: {} for {pace}", verdict.paces[entrant]);
    }
    assert!(verdict.figures.iter().any(|figures| figures.samples < verdict.figures[4].samples), "some have retired");
}

#[test]
fn the_best_pair_wins_at_ten_percent_noise() {
    let wins = wins_of(|_, _, _, noise| 1.0 + 0.1 * noise.normal());
    assert!(wins >= ENOUGH, "{wins}");
}

#[test]
fn the_best_pair_wins_while_everything_drifts_by_half() {
    let wins = wins_of(|_, gone, _, noise| (1.0 + 0.5 * gone) * (1.0 + 0.1 * noise.normal()));
    assert!(wins >= ENOUGH, "{wins}");
    let wins = wins_of(|_, gone, _, noise| (1.5 - 0.5 * gone) * (1.0 + 0.1 * noise.normal()));
    assert!(wins >= ENOUGH, "{wins}");
}

#[test]
fn the_best_pair_wins_through_spikes() {
    let wins = wins_of(|_, _, _, noise| {
        let spike = if noise.uniform() < 0.05 { 8.0 } else { 1.0 };
        spike * (1.0 + 0.05 * noise.normal())
    });
    assert!(wins >= ENOUGH, "{wins}");
}

#[test]
fn a_machine_so_busy_that_most_samples_are_interrupted_still_finds_a_good_pair() {
    let script = script();
    let good = (FIRST_SEED..FIRST_SEED + RUNS).filter(|seed| {
        let mut noise = Noise::new(*seed);
        let (verdict, _) = run_for(&script, Duration::from_secs(5), &mut |_, _, _| {
            let interruption = if noise.uniform() < 0.6 { 2.0 + 20.0 * noise.uniform() } else { 1.0 };
            interruption * (1.0 + 0.05 * noise.normal())
        });
        verdict.is_some_and(|verdict| script.times[winners(&verdict)[0]] <= 1.12 * script.times[WINNERS[0]])
    });
    let good = good.count();
    assert!(good >= ENOUGH, "{good}");
}

#[test]
fn a_slow_start_does_not_decide() {
    let wins = wins_of(|_, _, taken, noise| {
        let cold = if taken < 5 { 4.0 } else { 1.0 };
        cold * (1.0 + 0.05 * noise.normal())
    });
    assert!(wins >= ENOUGH, "{wins}");
}

#[test]
fn a_candidate_that_starts_fast_and_gets_slower_loses() {
    // Entrant 0 and its partner look best by far until a third of the time is gone.
    let wins = wins_of(|entrant, gone, _, noise| {
        let own = match entrant {
            0 | 1 if gone < 0.33 => 0.7,
            _ => 1.0,
        };
        own * (1.0 + 0.05 * noise.normal())
    });
    assert!(wins >= ENOUGH, "{wins}");
}

#[test]
fn a_clear_winner_ends_the_race_early() {
    let mut script = script();
    script.times = [900.0, 900.0, 900.0, 900.0, 200.0, 300.0, 900.0, 900.0];
    let (verdict, time) = run_for(&script, Duration::from_secs(20), &mut |_, _, _| 1.0);
    let verdict = verdict.unwrap();
    assert_eq!(winners(&verdict), WINNERS);
    assert_eq!(verdict.figures[WINNERS[0]].samples, CLEAR_ROUNDS + MIN_ROUNDS);
    assert!(time < Duration::from_millis(50), "{time:?}");
}

#[test]
fn the_deadline_holds_whatever_a_sample_takes() {
    for deadline in [0, 1, 3, 5, 10, 45] {
        let deadline = Duration::from_millis(deadline);
        let (_, time) = run_for(&script(), deadline, &mut |_, _, _| 1.0);
        // The very first sample is the one whose cost nobody can foretell.
        assert!(time <= deadline.max(Duration::from_micros(300)), "{time:?} of {deadline:?}");
    }
}

#[test]
fn without_a_few_complete_rounds_there_is_no_verdict() {
    let (verdict, _) = run_for(&script(), Duration::from_millis(7), &mut |_, _, _| 1.0);
    assert!(verdict.is_none());
    let script = Script { entrants: Vec::new(), times: [0.0; 8] };
    assert!(run(&script, &mut |_, _, _| 1.0).0.is_none());
}

#[test]
fn the_winners_share_a_layout_even_if_others_are_faster_alone() {
    let mut script = script();
    script.times = [100.0, 90_000.0, 90_000.0, 100.0, 270.0, 540.0, 110.0, 90_000.0];
    let (verdict, _) = run_for(&script, Duration::from_secs(20), &mut |_, _, _| 1.0);
    let verdict = verdict.unwrap();
    assert_eq!(winners(&verdict), WINNERS);
}

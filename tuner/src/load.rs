//! Whether anybody else was at work while kernels were measured.

use crate::linux::{Linux, Ticks};

/// Processors that other work may take from the threads that are measured before figures are not believed.
const SPARE: f64 = 0.25;

/// The reference kernel's times may spread so far, as the distance between their quartiles over their median.
const SPREAD: f64 = 0.25;

/// So few times of the reference say nothing.
const LEAST_TIMES: usize = 8;

/// The system's counters when measuring began.
pub(crate) struct Load {
    linux: Linux,
    begin: Option<Ticks>,
}

impl Load {
    pub(crate) fn begin() -> Self {
        Self::begin_on(Linux::host())
    }

    fn begin_on(linux: Linux) -> Self {
        let begin = linux.ticks();
        Self { linux, begin }
    }

    /// Why what was measured since the beginning with `threads` threads is not to be relied on, in a few words, or `None`.
    /// `reference` are times of one kernel, spread over all the time, in whatever unit.
    pub(crate) fn disturbance(&self, threads: usize, reference: &[f64]) -> Option<String> {
        let others = self.begin.zip(self.linux.ticks()).and_then(|(begin, end)| end.others_since(&begin));
        if let Some((others, processors)) = others
            && others + threads as f64 > processors as f64 + SPARE
        {
            return Some(format!("other work kept {others:.1} of {processors} processors busy"));
        }
        let mut times = reference.to_vec();
        times.sort_by(f64::total_cmp);
        let at = |part: usize| times[(times.len() - 1) * part / 4];
        if times.len() < LEAST_TIMES || at(3) - at(1) <= SPREAD * at(2) {
            return None;
        }
        let spread = 100.0 * (at(3) - at(1)) / at(2);
        Some(format!("the time of one and the same kernel varied by {spread:.0} %"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Counters of two processors: 100 ticks a second each, of which others and this process have used so many.
    fn write(root: &std::path::Path, seconds: u64, others: u64, own: u64) {
        fs::create_dir_all(root.join("proc/self")).unwrap();
        let idle = 200 * seconds - others - own;
        let stat = format!("cpu  {} 0 10 {idle} 0 0 0 {others} 0 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n", 1000 + own);
        fs::write(root.join("proc/stat"), stat).unwrap();
        let own_stat = format!("77 (a (b) c) S 1 1 1 0 -1 4194560 1 2 3 4 {own} 0 0 0 20 0 3 0 9 9 9\n");
        fs::write(root.join("proc/self/stat"), own_stat).unwrap();
    }

    fn disturbance(others: u64, own: u64, threads: usize, reference: &[f64]) -> Option<String> {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), 0, 0, 0);
        let load = Load::begin_on(Linux::at(root.path()));
        write(root.path(), 10, others, own);
        load.disturbance(threads, reference)
    }

    #[test]
    fn other_work_counts_only_as_far_as_it_leaves_too_few_processors() {
        assert_eq!(disturbance(20, 1900, 2, &[]), None);
        let busy = disturbance(800, 1100, 2, &[]).unwrap();
        assert_eq!(busy, "other work kept 0.8 of 2 processors busy");
        assert_eq!(disturbance(800, 1000, 1, &[]), None, "one of two processors was free all the time");
        assert!(disturbance(1500, 500, 1, &[]).is_some());
    }

    #[test]
    fn a_reference_that_spreads_tells_of_work_that_nobody_counts() {
        let steady: Vec<f64> = (0..20).map(|at| 1e-4 * (1.0 + 0.005 * f64::from(at))).collect();
        let wild: Vec<f64> = (0..20).map(|at| 1e-4 * (1.0 + 0.1 * f64::from(at))).collect();
        assert_eq!(disturbance(0, 1900, 2, &steady), None);
        assert!(disturbance(0, 1900, 2, &wild).unwrap().contains("one and the same kernel"));
        assert_eq!(disturbance(0, 1900, 2, &wild[..LEAST_TIMES - 1]), None);
    }

    #[test]
    fn where_nothing_is_counted_nothing_is_said() {
        let nowhere = tempfile::tempdir().unwrap();
        assert_eq!(Load::begin_on(Linux::at(nowhere.path())).disturbance(64, &[]), None);
    }
}

//! Time as a value that is handed in, so that a test can script it.

use std::time::{Duration, Instant};

/// Tells how much time has passed since some fixed moment.
pub trait Stopwatch {
    /// Time since the stopwatch was started; never goes back.
    fn elapsed(&self) -> Duration;
}

/// The system's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct SystemStopwatch(Instant);

impl SystemStopwatch {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Stopwatch for SystemStopwatch {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(test)]
pub(crate) mod scripted {
    use ternion_kernels_ref::SplitMix64;

    use super::*;
    use std::sync::Mutex;

    /// A clock that moves only when a script says so.
    #[derive(Default)]
    pub(crate) struct ScriptedStopwatch(Mutex<Duration>);

    impl ScriptedStopwatch {
        pub(crate) fn advance(&self, by: Duration) {
            *self.0.lock().unwrap() += by;
        }
    }

    impl Stopwatch for ScriptedStopwatch {
        fn elapsed(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }

    /// Seeded noise.
    pub(crate) struct Noise(SplitMix64);

    impl Noise {
        pub(crate) fn new(seed: u64) -> Self {
            Self(SplitMix64::new(seed))
        }

        /// In `0..1`.
        pub(crate) fn uniform(&mut self) -> f64 {
            (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
        }

        /// Standard normal (Box-Muller), kept within four deviations so that no scripted time is negative.
        pub(crate) fn normal(&mut self) -> f64 {
            let (a, b) = (self.uniform(), self.uniform());
            ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()).clamp(-4.0, 4.0)
        }
    }
}

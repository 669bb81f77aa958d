//! The learning-rate schedule: linear warm-up, then a cosine down to a floor.

use serde::{Deserialize, Serialize};

/// Warm-up and cosine decay. A pure function of the step, so a resumed run needs only the step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Schedule {
    /// The highest learning rate, reached at the end of the warm-up.
    pub peak: f64,
    /// Steps of linear warm-up; 0 for none.
    pub warmup_steps: u64,
    /// Steps in all, warm-up included; from there on the rate is `floor`.
    pub total_steps: u64,
    /// The rate that the cosine ends at.
    pub floor: f64,
}

impl Schedule {
    /// A schedule with these values.
    #[must_use]
    pub fn new(peak: f64, warmup_steps: u64, total_steps: u64, floor: f64) -> Self {
        Self { peak, warmup_steps, total_steps, floor }
    }

    /// The same rate at every step.
    #[must_use]
    pub fn constant(rate: f64) -> Self {
        Self::new(rate, 0, 0, rate)
    }

    /// The learning rate of a step; the first step is 0 and already has a rate above zero.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step as f64 + 1.0) / self.warmup_steps as f64;
        }
        if step >= self.total_steps {
            return self.floor;
        }
        let done = (step - self.warmup_steps) as f64;
        let length = (self.total_steps - self.warmup_steps) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done / length).cos());
        self.floor + (self.peak - self.floor) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_cosine_then_floor() {
        let schedule = Schedule::new(1.0, 4, 14, 0.1);
        assert_eq!((0..4).map(|step| schedule.at(step)).collect::<Vec<_>>(), [0.25, 0.5, 0.75, 1.0]);
        assert_eq!(schedule.at(4), 1.0);
        assert!((schedule.at(9) - 0.55).abs() < 1e-12);
        assert!((4..14).all(|step| schedule.at(step + 1) < schedule.at(step)));
        assert_eq!((schedule.at(14), schedule.at(u64::MAX)), (0.1, 0.1));
        assert_eq!(Schedule::constant(3e-3).at(77), 3e-3);
    }
}

//! Samples: one value a round.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Goal, Unit};

/// At least one value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sample(Vec<f64>);

impl Sample {
    /// # Panics
    /// When there is nothing in it.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    pub(super) fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    pub(super) fn least(&self) -> f64 {
        self.0[0]
    }

    pub(super) fn most(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// The median of the distances from the median.
    pub(super) fn spread(&self) -> f64 {
        let median = self.median();
        Self::of(self.0.iter().map(|value| (value - median).abs())).median()
    }

    /// The median, and what half of the rounds are within.
    pub(super) fn show(&self, unit: Unit) -> String {
        match self.0.len() {
            1 => unit.show(self.median()),
            _ => format!("{} ± {}", unit.number(self.median()), unit.show(self.spread())),
        }
    }

    /// The median, the least and the most.
    pub(super) fn range(&self, unit: Unit) -> String {
        match self.0.len() {
            1 => unit.show(self.median()),
            _ => format!(
                "{} ({} to {})",
                unit.show(self.median()),
                unit.number(self.least()),
                unit.number(self.most())
            ),
        }
    }
}

impl Unit {
    pub(super) fn number(self, value: f64) -> String {
        match self {
            Self::Ratio if value < 0.1 => format!("{value:.3}"),
            Self::Ratio => format!("{value:.2}"),
            Self::Millis if value < 10.0 => format!("{value:.2}"),
            Self::Micros | Self::Millis | Self::Mebibytes if value < 100.0 => format!("{value:.1}"),
            Self::Micros
            | Self::Millis
            | Self::Mebibytes
            | Self::Bytes
            | Self::PerSecond
            | Self::MebibytesPerSecond => format!("{value:.0}"),
        }
    }

    pub(super) fn show(self, value: f64) -> String {
        let number = self.number(value);
        match self {
            Self::Ratio => format!("{number} ×"),
            Self::Micros => format!("{number} µs"),
            Self::Millis => format!("{number} ms"),
            Self::Bytes => format!("{number} B"),
            Self::Mebibytes => format!("{number} MiB"),
            Self::PerSecond => format!("{number} /s"),
            Self::MebibytesPerSecond => format!("{number} MiB/s"),
        }
    }
}

impl Goal {
    pub(super) fn show(self, unit: Unit) -> String {
        match self {
            Self::AtLeast(goal) => format!("≥ {}", unit.show(goal)),
            Self::AtMost(goal) => format!("≤ {}", unit.show(goal)),
        }
    }
}

/// The ratios of two contenders, round by round.
pub(super) fn ratios(ours: &[f64], theirs: &[f64]) -> Sample {
    Sample::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
}

pub(super) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

pub(super) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The median of some durations.
///
/// # Panics
/// When there are none.
pub(super) fn p50(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_told_by_its_median_and_its_spread() {
        let sample = Sample::of([5.0, 1.0, 2.0, 100.0, 4.0]);
        let all = [sample.median(), sample.least(), sample.most(), sample.spread()];
        assert_eq!(all, [4.0, 1.0, 100.0, 2.0]);
        assert_eq!(sample.show(Unit::Micros), "4.0 ± 2.0 µs");
        assert_eq!(sample.range(Unit::PerSecond), "4 /s (1 to 100)");
        assert_eq!(ratios(&[2.0, 6.0], &[1.0, 2.0]).most(), 3.0);
    }
}

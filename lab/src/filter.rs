//! Which schedules of a space are meant.

use std::collections::BTreeSet;
use std::str::FromStr;

use ternion_compiler::{Cpu, Family, KernelSpec, MachineKind, Multiply, Schedule};

/// A condition on one parameter: `prefetch=0,4096`, the values that it may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    parameter: Parameter,
    values: Vec<String>,
}

/// A parameter of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Parameter {
    /// The idea.
    Family,
    /// The machine.
    Machine,
    /// The order of the weights.
    Layout,
    /// The multiplication.
    Multiply,
    /// Steps per loop turn.
    Unroll,
    /// Columns that share a pass.
    Ntile,
    /// How far ahead the cache is asked.
    Prefetch,
}

/// A text that names no parameter, or no condition on one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseConditionError {
    /// No parameter.
    #[error("`{0}` is no parameter of a schedule: expected one of {names}", names = Parameter::names())]
    Parameter(String),
    /// No condition.
    #[error("`{0}` is no condition: expected PARAMETER=VALUE[,VALUE], for example prefetch=0,4096")]
    Condition(String),
}

impl Parameter {
    /// All parameters, in the order of a schedule's line.
    pub const ALL: [Self; 7] =
        [Self::Family, Self::Machine, Self::Layout, Self::Multiply, Self::Unroll, Self::Ntile, Self::Prefetch];

    /// Its name in a schedule's line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Family => "family",
            Self::Machine => "machine",
            Self::Layout => "layout",
            Self::Multiply => "multiply",
            Self::Unroll => "unroll",
            Self::Ntile => "ntile",
            Self::Prefetch => "prefetch",
        }
    }

    fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Its value in a schedule, as a schedule's line has it.
    #[must_use]
    pub fn of(self, schedule: &Schedule) -> String {
        match self {
            Self::Family => schedule.family.to_string(),
            Self::Machine => schedule.machine.to_string(),
            Self::Layout => schedule.layout.to_string(),
            Self::Multiply => match schedule.multiply {
                Multiply::Pairs => "pairs".to_owned(),
                Multiply::Dot => "dot".to_owned(),
            },
            Self::Unroll => schedule.unroll.to_string(),
            Self::Ntile => schedule.ntile.to_string(),
            Self::Prefetch => schedule.prefetch.to_string(),
        }
    }
}

impl FromStr for Parameter {
    type Err = ParseConditionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|parameter| parameter.name() == text);
        known.ok_or_else(|| ParseConditionError::Parameter(text.to_owned()))
    }
}

impl FromStr for Condition {
    type Err = ParseConditionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, values) = text.split_once('=').ok_or_else(|| ParseConditionError::Condition(text.to_owned()))?;
        let values: Vec<_> = values.split(',').map(str::to_owned).collect();
        if values.iter().any(String::is_empty) {
            return Err(ParseConditionError::Condition(text.to_owned()));
        }
        Ok(Self { parameter: name.parse()?, values })
    }
}

/// The schedules that are meant; by default all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only these families, if any are named.
    pub families: Vec<Family>,
    /// Only these machines, if any are named.
    pub machines: Vec<MachineKind>,
    /// Only schedules that meet all of these.
    pub conditions: Vec<Condition>,
}

impl Filter {
    /// Whether `schedule` is meant.
    #[must_use]
    pub fn admits(&self, schedule: &Schedule) -> bool {
        (self.families.is_empty() || self.families.contains(&schedule.family))
            && (self.machines.is_empty() || self.machines.contains(&schedule.machine))
            && self.conditions.iter().all(|condition| condition.values.contains(&condition.parameter.of(schedule)))
    }

    /// All legal schedules for `spec` on `cpu` that are meant, or only those that are worth measuring.
    #[must_use]
    pub fn schedules(&self, spec: &KernelSpec, cpu: &Cpu, candidates: bool) -> Vec<Schedule> {
        let all = if candidates {
            Schedule::candidates(spec, cpu)
        } else {
            let families: Vec<_> = if self.families.is_empty() { Family::ALL.to_vec() } else { self.families.clone() };
            Schedule::space_of(&families, spec, cpu)
        };
        let mut seen = BTreeSet::new();
        all.into_iter().filter(|schedule| self.admits(schedule) && seen.insert(*schedule)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_name_values_of_a_parameter() {
        let filter = |texts: &[&str]| Filter {
            conditions: texts.iter().map(|text| text.parse().unwrap()).collect(),
            ..Filter::default()
        };
        let schedule: Schedule =
            "mad/avx2 layout=lanes16x4 multiply=pairs unroll=2 ntile=1 prefetch=4096".parse().unwrap();
        assert!(filter(&[]).admits(&schedule));
        assert!(filter(&["prefetch=0,4096", "layout=lanes16x4", "machine=avx2"]).admits(&schedule));
        assert!(!filter(&["prefetch=0"]).admits(&schedule) && !filter(&["unroll=1,4"]).admits(&schedule));
        for text in ["", "prefetch", "prefetch=", "prefetch=0,", "colour=red"] {
            assert!(text.parse::<Condition>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_parameter_parses_back() {
        for parameter in Parameter::ALL {
            assert_eq!(parameter.name().parse(), Ok(parameter));
        }
    }
}

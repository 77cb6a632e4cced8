use credbroker_fuzz::{Spoiler, inputs};

use super::TARGETS;

/// Good inputs are good, spoiled ones are not, and neither breaks a promise; what once broke one
/// is among them.
#[test]
fn kept_inputs_hold_no_surprise() {
    for (name, target) in TARGETS {
        let inputs = inputs(name).unwrap();
        let good = inputs.iter().filter(|(_, bytes)| target(bytes)).count();
        assert!(good > 0 && good < inputs.len(), "{name}: {good} of {}", inputs.len());
    }
}

/// G7 of the design: 10 000 bad inputs for each of what comes from outside, and no panic.
#[test]
fn g7_ten_thousand_bad_inputs() {
    const CASES: usize = 10_000;
    // A policy comes from a file that was parsed, and is made here of any bytes: none is bad.
    let outside = TARGETS.into_iter().filter(|(name, _)| *name != "policy");
    for (number, (name, target)) in outside.enumerate() {
        let (inputs, mut spoiler) = (inputs(name).unwrap(), Spoiler::new(number as u64));
        let (mut refused, mut changed) = (0, 0);
        for case in 0..CASES {
            let one = &inputs[case % inputs.len()].1;
            let other = &inputs[(case * 7 + 1) % inputs.len()].1;
            let spoiled = spoiler.spoil(one, other);
            changed += usize::from(spoiled != *one);
            refused += usize::from(!target(&spoiled));
        }
        println!("G7: {name}: {CASES} inputs, {changed} spoiled, {refused} refused, 0 panics");
        assert!(changed > CASES / 2 && refused > 0, "{name}");
    }
}

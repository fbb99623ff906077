//! From counters to what happened between two looks at them. Pure.

use super::series::Values;

/// What is counted from the start of a machine on, and what there is of it now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Microseconds for which its VMM had a CPU.
    pub cpu_micros: u64,
    /// Bytes that it sent.
    pub sent_bytes: u64,
    /// Bytes that it received.
    pub received_bytes: u64,
    /// Memory that is only its own.
    pub memory_bytes: u64,
    /// What its disk takes of the host's.
    pub disk_bytes: u64,
}

/// What was counted between two looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// What it means.
    pub values: Values,
    /// The time between the two, in milliseconds; above 0.
    pub length: i64,
    /// What was counted in it, with the memory and disk of now.
    pub counted: Counters,
}

/// Compares what is counted with what was counted before.
#[derive(Debug, Clone, Copy, Default)]
pub struct Meter {
    former: Option<(i64, Counters)>,
}

impl Meter {
    /// What happened since the last look. None at the first one, when no time has passed, and when a counter has gone
    /// back: what it counts has begun anew, and what happened until then is not known.
    pub fn look(&mut self, at: i64, counters: Counters, vcpus: u32) -> Option<Measured> {
        let (before, former) = self.former.replace((at, counters))?;
        let length = at.checked_sub(before).filter(|length| *length > 0)?;
        let counted = Counters {
            cpu_micros: counters.cpu_micros.checked_sub(former.cpu_micros)?,
            sent_bytes: counters.sent_bytes.checked_sub(former.sent_bytes)?,
            received_bytes: counters.received_bytes.checked_sub(former.received_bytes)?,
            ..counters
        };
        let kib = |bytes: u64| u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            reason = "a rate needs few digits"
        )]
        let per_millisecond = |count: u64, factor: f64| (count as f64 / length as f64 * factor) as f32;
        let values = Values {
            // A millisecond has a thousand microseconds of each CPU.
            cpu_percent: per_millisecond(counted.cpu_micros, 0.1 / f64::from(vcpus.max(1))),
            memory_kib: kib(counters.memory_bytes),
            disk_kib: kib(counters.disk_bytes),
            sent_per_second: per_millisecond(counted.sent_bytes, 1000.0),
            received_per_second: per_millisecond(counted.received_bytes, 1000.0),
        };
        Some(Measured { values, length, counted })
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn counters(cpu_micros: u64, sent_bytes: u64, received_bytes: u64) -> Counters {
        Counters { cpu_micros, sent_bytes, received_bytes, memory_bytes: 5 << 20, disk_bytes: 3 << 10 }
    }

    #[test]
    fn what_is_counted_becomes_a_rate() {
        let mut meter = Meter::default();
        assert_eq!(meter.look(1_000, counters(10_000, 100, 0), 2), None);
        let measured = meter.look(1_500, counters(510_000, 600, 1_000_000), 2).unwrap();
        assert_eq!(measured.length, 500);
        assert_eq!(
            measured.values,
            Values {
                cpu_percent: 50.0,
                memory_kib: 5 << 10,
                disk_kib: 3,
                sent_per_second: 1000.0,
                received_per_second: 2_000_000.0,
            }
        );
        // The same again a second later: nothing has happened.
        let idle = meter.look(2_500, counters(510_000, 600, 1_000_000), 2).unwrap();
        assert_eq!((idle.values.cpu_percent, idle.counted.sent_bytes), (0.0, 0));
    }

    #[test]
    fn what_begins_anew_has_no_rate_until_the_look_after() {
        let mut meter = Meter::default();
        meter.look(0, counters(900, 900, 900), 1);
        assert_eq!(meter.look(500, counters(1, 1000, 1000), 1), None);
        assert_eq!(meter.look(1000, counters(2, 1000, 1000), 1).unwrap().counted.cpu_micros, 1);
    }

    proptest! {
        #[test]
        fn no_rate_is_negative_or_no_number(
            looks in vec((any::<i64>(), any::<u64>(), any::<u64>(), any::<u64>(), 0_u32..64), 0..20),
        ) {
            let mut meter = Meter::default();
            for (at, cpu, sent, received, vcpus) in looks {
                if let Some(Measured { values, length, .. }) = meter.look(at, counters(cpu, sent, received), vcpus) {
                    prop_assert!(length > 0);
                    for rate in [values.cpu_percent, values.sent_per_second, values.received_per_second] {
                        prop_assert!(rate.is_finite() && rate >= 0.0);
                    }
                }
            }
        }

        #[test]
        fn nothing_is_counted_twice_or_lost(steps in vec((1_i64..10_000, 0_u64..1_000_000), 1..50)) {
            let (mut meter, mut at, mut sent) = (Meter::default(), 0, 7);
            meter.look(at, counters(0, sent, 0), 1);
            let mut total = 0;
            for (step, bytes) in &steps {
                at += step;
                sent += bytes;
                total += meter.look(at, counters(0, sent, 0), 1).unwrap().counted.sent_bytes;
            }
            prop_assert_eq!(total, steps.iter().map(|(_, bytes)| bytes).sum::<u64>());
        }
    }
}

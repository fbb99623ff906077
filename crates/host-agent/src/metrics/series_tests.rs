use proptest::{collection::vec, prelude::*};

use super::*;

const ALL: [Resolution; 3] = [Resolution::Fine, Resolution::Middle, Resolution::Coarse];

fn values() -> impl Strategy<Value = Values> {
    (0.0_f32..200.0, any::<u32>(), any::<u32>(), 0.0_f32..1e9, 0.0_f32..1e9).prop_map(
        |(cpu_percent, memory_kib, disk_kib, sent_per_second, received_per_second)| Values {
            cpu_percent,
            memory_kib,
            disk_kib,
            sent_per_second,
            received_per_second,
        },
    )
}

/// How long after the one before, and what: mostly as the sampler does it, at times late, at times after a pause.
fn measured() -> impl Strategy<Value = (i64, Values)> {
    let step =
        prop_oneof![20 => 400_i64..700, 3 => 700_i64..40_000, 1 => 40_000_i64..90_000_000, 1 => -5_i64..1];
    (step, values())
}

fn flat(cpu_percent: f32) -> Values {
    Values { cpu_percent, memory_kib: 1000, disk_kib: 7, sent_per_second: 3.0, received_per_second: 4.0 }
}

/// A series of what was measured, and when it ends.
fn series(begin: i64, all: &[(i64, Values)]) -> (Series, i64) {
    let (mut series, mut now) = (Series::default(), begin);
    for (step, values) in all {
        series.push(Point { at: now + step, values: *values }, *step);
        now = now.max(now + step);
    }
    (series, now)
}

fn in_order(points: &[Point]) -> bool {
    points.windows(2).all(|pair| pair[0].at < pair[1].at)
}

proptest! {
    #[test]
    fn points_are_in_order_in_time_and_few(begin in -1_000_000_000_i64..1_000_000_000, all in vec(measured(), 0..80)) {
        let (series, now) = series(begin, &all);
        for resolution in ALL {
            let points = series.points(now, resolution.kept());
            prop_assert!(in_order(&points));
            prop_assert!(points.len() <= resolution.capacity() + 1);
            for point in &points {
                prop_assert!(point.at <= now && point.at > now - resolution.kept());
                prop_assert!(point.values.is_sound());
            }
        }
    }

    #[test]
    fn a_mean_lies_between_what_it_is_a_mean_of(all in vec(measured(), 1..60)) {
        let (series, now) = series(0, &all);
        let (mut lowest, mut highest) = (all[0].1.numbers(), all[0].1.numbers());
        for (_, values) in &all {
            for (index, number) in values.numbers().into_iter().enumerate() {
                lowest[index] = lowest[index].min(number);
                highest[index] = highest[index].max(number);
            }
        }
        for resolution in [Resolution::Middle, Resolution::Coarse] {
            for point in series.points(now, resolution.kept()) {
                for (index, number) in point.values.numbers().into_iter().enumerate() {
                    let slack = 1.0 + highest[index] * 1e-6;
                    prop_assert!(number >= lowest[index] - slack && number <= highest[index] + slack);
                }
            }
        }
    }

    #[test]
    fn nothing_is_made_up_for_a_gap(
        before in vec((400_i64..700, values()), 1..40),
        gap in 1_000_i64..86_000_000,
        after in vec((400_i64..700, values()), 1..40),
    ) {
        let (mut series, paused) = series(0, &before);
        let resumed = paused + gap;
        let mut now = resumed;
        for (step, values) in after {
            now += step;
            series.push(Point { at: now, values }, step);
        }
        for resolution in ALL {
            for point in series.points(now, resolution.kept()) {
                prop_assert!(point.at <= paused || point.at > resumed, "{point:?} is in {paused}..{resumed}");
            }
        }
    }

    #[test]
    fn what_was_saved_is_in_order_and_not_of_the_future(
        all in vec(measured(), 0..60),
        wall in 1_600_000_000_000_i64..2_000_000_000_000,
        later in 0_i64..100_000_000,
        jump in -100_000_000_i64..100_000_000,
    ) {
        let (before, now) = series(0, &all);
        let saved = before.saved(wall);
        // Another agent, whose line begins anew, and a wall clock that somebody has set.
        let after = Series::restored(&saved, 0, wall + now + later + jump);
        for resolution in [Resolution::Middle, Resolution::Coarse] {
            let points = after.points(0, resolution.kept());
            prop_assert!(in_order(&points));
            prop_assert!(points.iter().all(|point| point.at <= 0 && point.at > -resolution.kept()));
            if jump == 0 {
                let known = before.points(now + later, resolution.kept());
                let moved: Vec<Point> = points.iter().map(|point| Point { at: point.at + now + later, ..*point }).collect();
                prop_assert_eq!(known, moved);
            }
        }
    }

    #[test]
    fn what_is_read_from_a_file_may_say_anything(
        points in vec((any::<i64>(), any::<f32>(), any::<u32>(), any::<u32>(), any::<f32>(), any::<f32>()), 0..300),
        now: i32,
        wall: i64,
    ) {
        let points: Vec<Point> = points.into_iter().map(Point::from).collect();
        let now = i64::from(now);
        let mut series = Series::restored(&Saved { middle: points.clone(), coarse: points }, now, wall);
        series.push(Point { at: now + 500, values: flat(1.0) }, 500);
        for resolution in ALL {
            let found = series.points(now + 500, resolution.kept());
            prop_assert!(in_order(&found));
            prop_assert!(found.iter().all(|point| point.values.is_sound()));
        }
    }
}

#[test]
fn ranges_have_the_resolution_in_which_they_are_whole() {
    let minute = 60_000;
    for (minutes, resolution) in [
        (5, Resolution::Fine),
        (10, Resolution::Fine),
        (60, Resolution::Middle),
        (120, Resolution::Middle),
        (360, Resolution::Coarse),
        (1440, Resolution::Coarse),
        (10_000, Resolution::Coarse),
    ] {
        assert_eq!(Resolution::of_range(minutes * minute), resolution);
    }
    assert_eq!(ALL.map(Resolution::capacity), [1200, 240, 288]);
}

#[test]
fn a_day_fills_every_ring_and_no_more() {
    // Two a second, for a day and some minutes.
    let last = 2 * 86_400 + 5_000;
    let mut series = Series::default();
    for sample in 1..=last {
        series.push(Point { at: sample * SAMPLE_MS, values: flat(50.0) }, SAMPLE_MS);
    }
    let now = last * SAMPLE_MS;
    let lengths = ALL.map(|resolution| series.points(now, resolution.kept()).len());
    assert_eq!(lengths[0], 1200);
    assert!((240..=241).contains(&lengths[1]) && (288..=289).contains(&lengths[2]), "{lengths:?}");
    assert!(series.points(now, Resolution::Coarse.kept()).iter().all(|point| point.values == flat(50.0)));
    assert!(series.fine.points.capacity() <= 1200 && series.coarse.ring.points.capacity() <= 288);
}

#[test]
fn a_late_measurement_counts_for_the_time_that_it_is_of() {
    let mut series = Series::default();
    series.push(Point { at: 1_000, values: flat(0.0) }, 1_000);
    series.push(Point { at: 10_000, values: flat(100.0) }, 9_000);
    let mean = series.points(10_000, Resolution::Middle.kept());
    assert_eq!(mean, [Point { at: 10_000, values: flat(90.0) }]);
}

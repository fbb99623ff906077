//! What becomes of guests' memory outside of it.

use super::{
    super::{Facts, Fix, tree::Seen},
    Verdict, if_known,
};

pub(super) fn ksm(facts: &Facts) -> Verdict {
    const RUN: &str = "/sys/kernel/mm/ksm/run";
    const REMEDY: &str = "echo 2 > /sys/kernel/mm/ksm/run, and disable what turns it on (ksmtuned)";
    match &facts.ksm {
        Seen::Absent => Verdict::ok("the kernel cannot merge equal pages"),
        Seen::Is(1) => {
            Verdict::failure("equal pages are merged, which shows one guest what another holds", REMEDY)
                .fixed_by([Fix::Set { path: RUN, value: "2" }])
        }
        Seen::Is(_) => Verdict::ok("equal pages are not merged"),
        Seen::Unreadable(why) => Verdict::unknown(format!("{RUN} cannot be read: {why}"), REMEDY),
    }
}

pub(super) fn swap(facts: &Facts) -> Verdict {
    const REMEDY: &str = "swapoff -a, and remove it from /etc/fstab; or have it on an encrypted device";
    match &facts.swaps {
        // A kernel without swap has no such file.
        Seen::Absent => Verdict::ok("the kernel has no swap"),
        Seen::Unreadable(why) => Verdict::unknown(format!("/proc/swaps cannot be read: {why}"), REMEDY),
        Seen::Is(swaps) => {
            let open: Vec<_> =
                swaps.iter().filter(|swap| !swap.is_safe).map(|swap| swap.name.as_str()).collect();
            match (open.is_empty(), swaps.is_empty()) {
                (true, true) => Verdict::ok("memory is written to no disk"),
                (true, false) => Verdict::ok("memory is swapped only into memory or to encrypted devices"),
                (false, _) => Verdict::failure(
                    format!("memory of guests may be written to {}", open.join(", ")),
                    REMEDY,
                ),
            }
        }
    }
}

pub(super) fn errors(facts: &Facts) -> Verdict {
    const REMEDY: &str = "use memory that corrects errors (ECC) and refreshes rows that are aimed at (TRR)";
    if_known(&facts.error_correcting, "whether memory corrects errors", REMEDY, |count| match count {
        0 => Verdict::advice("no memory controller says that it corrects errors", REMEDY),
        count => Verdict::ok(format!("memory controllers that correct errors: {count}")),
    })
}

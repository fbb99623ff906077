//! What a guest's kernel says on its console when it ends. Pure.
//!
//! A guest writes what it likes there, so it can pretend any of this, about itself.

/// A kernel that panics.
const PANIC: &str = "Kernel panic - not syncing";
/// One that starts its machine anew.
const RESTART: &str = "reboot: Restarting system";
/// One that has nothing more to do, on a machine that it cannot turn off.
const HALTED: [&str; 2] = ["reboot: System halted", "reboot: Power down"];
/// In how much of the end of a console those are looked for: what comes after them is little.
pub(crate) const END: usize = 512;

/// Whether a kernel that ended the machine has panicked, and not restarted it in good order.
pub(crate) fn is_panic(console: &str) -> bool {
    console.rfind(PANIC) > console.rfind(RESTART)
}

/// Whether it says that it panicked or restarted: the machine ends after either.
pub(crate) fn is_end(console: &str) -> bool {
    console.contains(PANIC) || console.contains(RESTART)
}

/// Whether a kernel has halted, by the end of the console. Only a whole line of its own counts, as the kernel alone writes it.
pub(crate) fn has_halted(end: &str) -> bool {
    let whole = &end[..end.rfind('\n').map_or(0, |at| at + 1)];
    // The first line may have begun before.
    whole.lines().any(|line| {
        let line = line.trim_end();
        let text = line.strip_prefix('[').and_then(|rest| Some(rest.split_once("] ")?.1)).unwrap_or(line);
        HALTED.contains(&text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_panic_is_told_from_a_reboot_by_the_last_words() {
        let panic = format!("[    1.7] {PANIC}: Attempted to kill init!\r\n[    1.8] Kernel Offset: 0x2\r\n");
        let reboot = format!("[    2.0] {RESTART}\r\n[    2.0] reboot: machine restart\r\n");
        assert!(is_panic(&panic) && !is_panic(&reboot) && !is_panic(&format!("{panic}{reboot}")));
        assert!(!is_panic(""), "a triple fault says nothing");
        assert!(is_end(&panic) && is_end(&reboot) && !is_end("tick"));
    }

    #[test]
    fn a_halt_is_a_line_of_its_own() {
        for halted in [
            "[    2.031] reboot: System halted\r\n",
            "x\nreboot: Power down\n",
            "[1] reboot: Power down\nmore\n",
        ] {
            assert!(has_halted(halted), "{halted}");
        }
        for not in
            ["", "reboot: Power down", "[ 1.0] a[7]: reboot: Power down\n", "echo reboot: System halted\n"]
        {
            assert!(!has_halted(not), "{not}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(\\[|\\]| |\n|é|reboot: Power down){0,30}") {
            has_halted(&text);
        }
    }
}

//! What a guest sees of the host's processor where it runs on it, as one word: a snapshot that was taken on another
//! one is refused. Pure.

use sha2::{Digest, Sha256};

/// The lines of `/proc/cpuinfo` that say what a processor can do. The others say how it is at the moment.
const LINES: [&str; 6] = ["vendor_id", "cpu family", "model", "stepping", "flags", "vmx flags"];
/// Digits of the digest that are kept.
const DIGITS: usize = 16;

/// The word for the first processor of `/proc/cpuinfo`. Processors of one host are alike.
pub(super) fn word(cpuinfo: &str) -> String {
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let mut digest = Sha256::new();
    for line in first.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        if LINES.contains(&name.trim_end()) {
            digest.update(format!("{}:{}\n", name.trim_end(), value.trim()));
        }
    }
    let mut word = format!("{:x}", digest.finalize());
    word.truncate(DIGITS);
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\nmodel name\t: EPYC\ncpu MHz\t\t: 2649.998\nflags\t\t: fpu sse2 avx\nbogomips\t: 5299.99\n\nprocessor\t: 1\nflags\t\t: none\n";

    #[test]
    fn the_speed_of_the_moment_does_not_matter_and_a_feature_does() {
        let same = ONE.replace("2649.998", "1500.000").replace("5299.99", "3000.00");
        assert_eq!(word(ONE), word(&same));
        assert_eq!(word(ONE).len(), DIGITS);
        for other in [ONE.replace(" avx\n", "\n"), ONE.replace("\nmodel\t\t: 1", "\nmodel\t\t: 2")] {
            assert_ne!(word(ONE), word(&other));
        }
    }
}

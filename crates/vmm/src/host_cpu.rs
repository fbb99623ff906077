//! What a guest sees of the host's processor where it runs on it, as one word: a snapshot that was taken on another
//! one is refused.
//!
//! The kernel's list of flags holds more than what a processor has: bits of its own making, mitigations among them, and
//! features that it shows or hides by its version and its settings. A newer kernel on the same processor has another
//! list, and must not make what was saved useless. So only the instructions that count for programs are looked at,
//! those that kernels have known by one name for long.

use std::io;

use camino::Utf8Path;
use sha2::{Digest, Sha256};

use crate::{VmmResult, files::cannot};

/// The lines of `/proc/cpuinfo` that say which processor it is. The others say how it is at the moment.
const LINES: [&str; 4] = ["vendor_id", "cpu family", "model", "stepping"];
/// The line of what it can do, and what of that counts. Left out is what kernels turn off or on: nested
/// virtualisation, enclaves, protection keys, five levels of pages, random numbers, supervisor states, quality of
/// service and tracing.
const FLAGS: &str = "flags";
const INSTRUCTIONS: [&str; 65] = [
    "3dnow",
    "3dnowext",
    "abm",
    "adx",
    "aes",
    "avx",
    "avx2",
    "avx512_bitalg",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "bmi1",
    "bmi2",
    "clflush",
    "clflushopt",
    "clwb",
    "cmov",
    "cx16",
    "cx8",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fxsr",
    "gfni",
    "hle",
    "lahf_lm",
    "lm",
    "mmx",
    "mmxext",
    "movbe",
    "nx",
    "pclmulqdq",
    "pdpe1gb",
    "pni",
    "popcnt",
    "rdtscp",
    "rtm",
    "sha_ni",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "syscall",
    "tbm",
    "tsc",
    "vaes",
    "vpclmulqdq",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
];
/// Digits of the digest that are kept.
const DIGITS: usize = 16;

/// The word for the processor of this host.
pub(crate) fn seen() -> VmmResult<String> {
    let path = Utf8Path::new("/proc/cpuinfo");
    let read = std::fs::read_to_string(path).and_then(|cpuinfo| {
        word(&cpuinfo).ok_or_else(|| io::Error::other("it does not say which processor the host has"))
    });
    read.map_err(cannot("understand", path))
}

/// The word for the first processor of `/proc/cpuinfo`. Processors of one host are alike. None where the text does not
/// say which processor it is, or what it can do: then nothing is known of it.
fn word(cpuinfo: &str) -> Option<String> {
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let line = |wanted: &str| {
        let mut lines = first.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(name, _)| name.trim_end() == wanted).map(|(_, value)| value.trim())
    };
    let mut digest = Sha256::new();
    for name in LINES {
        digest.update(format!("{name}:{}\n", line(name)?));
    }
    let flags: Vec<&str> = line(FLAGS)?.split_ascii_whitespace().collect();
    for name in INSTRUCTIONS.into_iter().filter(|name| flags.contains(name)) {
        digest.update(format!("{name}\n"));
    }
    let mut word = format!("{:x}", digest.finalize());
    word.truncate(DIGITS);
    Some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: EPYC\nstepping\t: 1\ncpu MHz\t\t: 2649.998\nflags\t\t: fpu sse2 avx\nbogomips\t: 5299.99\n\nprocessor\t: 1\nflags\t\t: none\n";

    #[test]
    fn the_speed_of_the_moment_does_not_matter_and_a_feature_does() {
        let same = ONE.replace("2649.998", "1500.000").replace("5299.99", "3000.00");
        assert_eq!(word(ONE), word(&same));
        assert_eq!(word(ONE).map(|word| word.len()), Some(DIGITS));
        for (from, to) in [
            (" avx\n", "\n"),
            (" avx\n", " avx avx2\n"),
            ("\nmodel\t\t: 1", "\nmodel\t\t: 2"),
            ("stepping\t: 1", "stepping\t: 2"),
            ("AuthenticAMD", "GenuineIntel"),
        ] {
            let other = ONE.replace(from, to);
            assert!(word(&other).is_some_and(|other| word(ONE) != Some(other)), "{to}");
        }
    }

    /// An update of the host's kernel refused everything that had been saved before it.
    #[test]
    fn another_kernel_is_not_another_processor() {
        let newer = ONE
            .replace("fpu sse2 avx", "avx fpu ibrs_enhanced sse2 retpoline bhi vmmcall user_shstk la57 pku")
            .replace("bogomips", "vmx flags\t: vnmi ept\nbugs\t\t: spectre_v2 bhi\nbogomips");
        assert_eq!(word(ONE), word(&newer));
    }

    #[test]
    fn what_does_not_say_which_processor_it_is_has_no_word() {
        for unknown in
            ["", "processor\t: 0\n", &ONE.replace("flags", "Features"), &ONE.replace("model\t", "x\t")]
        {
            assert_eq!(word(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn each_instruction_counts_once() {
        assert!(INSTRUCTIONS.is_sorted_by(|one, other| one < other));
    }
}

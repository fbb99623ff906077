//! What the machine is to do: a file of JSON on its second disk, written by the host before it starts.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

/// The name of the file with the plan, below the root of the disk.
pub const FILE: &str = "plan.json";
/// Where the machine mounts that disk.
pub const INPUT: &str = "/lab/input";
/// Where programs leave files that are to come back; they find it in [`OUTPUT_VARIABLE`].
pub const OUTPUT: &str = "/lab/output";
/// The variable that names [`OUTPUT`].
pub const OUTPUT_VARIABLE: &str = "WRENN_LAB_OUTPUT";
/// The variable that is set in the lab and nowhere else, by which a test knows where it is.
pub const LAB_VARIABLE: &str = "WRENN_LAB";

/// Everything that is to be done in one machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Kernel modules that are there before the first program starts. Others the kernel loads when they are asked for.
    pub modules: Vec<String>,
    /// Directories of the disk, by name, and the absolute paths at which programs find them.
    pub binds: BTreeMap<String, PathBuf>,
    /// What programs have in their environment, beside what every one of them has.
    pub environment: BTreeMap<String, String>,
    /// Run one after the other, whatever becomes of each.
    pub programs: Vec<Program>,
}

/// One program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Its file, as the machine sees it.
    pub path: PathBuf,
    /// Without its name.
    pub arguments: Vec<String>,
    /// Where it starts; made if it is not there.
    pub directory: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let plan = Plan {
            modules: vec!["loop".to_owned()],
            binds: BTreeMap::from([("0".to_owned(), "/code/target/debug".into())]),
            environment: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            programs: vec![Program {
                path: "/code/target/debug/test".into(),
                arguments: vec!["--exact".to_owned()],
                directory: "/code".into(),
            }],
        };
        let text = serde_json::to_vec(&plan).unwrap();
        assert_eq!(serde_json::from_slice::<Plan>(&text).unwrap(), plan);
    }
}

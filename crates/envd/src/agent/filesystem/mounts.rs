//! What kind of file system a directory is on, as far as it matters for watching.
//!
//! The kernel notes what is done through this machine alone. On a file system that others change too, a watch would be
//! silent about most of what happens, so it is refused unless the client says that it knows.

use std::os::fd::AsFd;

use rustix::{fs::fstatfs, io::Errno};

/// What a directory is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mount {
    Local,
    /// Others may change it without this kernel's knowledge; it may also not answer for a long time.
    Network,
    /// The kernel's own view of itself, in which nothing is noted and the names are without end.
    Kernel,
}

/// `f_type` of file systems of the network, of other machines, and of programs (FUSE).
const NETWORK: [u64; 17] = [
    0x6969,      // nfs
    0xFF53_4D42, // cifs
    0xFE53_4D42, // smb2
    0x517B,      // smb
    0x6573_5546, // fuse, virtiofs
    0x0102_1997, // 9p
    0x00C3_6400, // ceph
    0x6B41_4653, // afs
    0x5346_414F, // openafs
    0x7375_7245, // coda
    0x564C,      // ncp
    0x0BD0_0BD0, // lustre
    0x0116_1970, // gfs2
    0x7461_636F, // ocfs2
    0x1983_0326, // beegfs
    0x786F_4256, // vboxsf
    0xBACB_ACBC, // vmhgfs
];

const KERNEL: [u64; 15] = [
    0x9FA0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_E0EB, // cgroup
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x1CD1,      // devpts
    0xCAFE_4A11, // bpf
    0x6165_676C, // pstore
    0x6265_6570, // configfs
    0xDE5E_81E4, // efivarfs
    0x6573_5543, // fusectl
    0x1980_0202, // mqueue
    0x4249_4E4D, // binfmt_misc
];

/// What an open directory is on.
pub(super) fn mount_of(directory: impl AsFd) -> Result<Mount, Errno> {
    Ok(classify(u64::try_from(fstatfs(directory)?.f_type).unwrap_or(0)))
}

fn classify(kind: u64) -> Mount {
    if NETWORK.contains(&kind) {
        Mount::Network
    } else if KERNEL.contains(&kind) {
        Mount::Kernel
    } else {
        Mount::Local
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn file_systems_of_this_machine() {
        let mount = |path: &str| mount_of(File::open(path).unwrap()).unwrap();
        assert_eq!(mount("/proc"), Mount::Kernel);
        assert_eq!(mount("/dev/shm"), Mount::Local);
        assert_eq!(classify(0x6969), Mount::Network);
        assert_eq!(classify(0x0102_1997), Mount::Network);
        assert_eq!(classify(0xEF53), Mount::Local);
    }
}

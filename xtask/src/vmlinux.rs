//! The kernel as it is in memory, which Firecracker starts: an ELF file that is inside of the bzImage, compressed.
//!
//! ```text
//!  bzImage   boot sector and set-up code, (1 + setup_sects) * 512 bytes │ code that decompresses
//!             0x1f1 setup_sects   0x202 HdrS   0x248 payload_offset   0x24c payload_length     └─ payload ─► vmlinux
//! ```
//!
//! Debian's cloud kernel is compressed with LZ4, in its legacy frames; behind them the kernel's build puts the length of what
//! comes out, which is no part of the stream.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cache::{self, Cache};

const KIND: &str = "vmlinux";
const FILE: &str = "vmlinux";
const ELF: &[u8] = b"\x7fELF";
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// The length that is behind the stream.
const TRAILER: usize = 4;

/// Finds it, or takes it out of the kernel's image. None where that is compressed in a way that is not known here: QEMU
/// does not need it.
pub(crate) fn find_or_make(cache: &Cache, image: &Path) -> Result<Option<PathBuf>> {
    let digest = cache::digest_of_file(image)?;
    let content = |limit: usize| -> Result<Vec<u8>> {
        let mut content = Vec::new();
        let file = File::open(image).with_context(|| format!("reading {}", image.display()))?;
        file.take(limit as u64).read_to_end(&mut content)?;
        Ok(content)
    };
    if content(ELF.len())? == ELF {
        return Ok(Some(image.to_owned()));
    }
    let whole = content(usize::MAX)?;
    let Some(payload) = payload(&whole).filter(|payload| payload.starts_with(LZ4_LEGACY)) else {
        return Ok(None);
    };
    let directory = cache.get_or_make(KIND, &digest, |directory| {
        let path = directory.join(FILE);
        decompress(payload, &path).with_context(|| format!("taking vmlinux out of {}", image.display()))
    })?;
    Ok(Some(directory.join(FILE)))
}

/// Puts it into a directory under its name, unless it is there. The directory may be in use.
pub(crate) fn add_to(directory: &Path, vmlinux: &Path) -> Result<()> {
    let place = directory.join(FILE);
    if place.is_file() {
        return Ok(());
    }
    let temporary = directory.join(format!("{FILE}.{}", std::process::id()));
    // It has 40 MB and more, and bundles of one kernel share it; a kernel of one's own may be on another file system.
    if fs::hard_link(vmlinux, &temporary).is_err() {
        fs::copy(vmlinux, &temporary)?;
    }
    fs::rename(&temporary, &place).with_context(|| format!("making {}", place.display()))
}

/// The compressed kernel in a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    // By the boot protocol 0 stands for 4.
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

fn decompress(payload: &[u8], to: &Path) -> Result<()> {
    let Some((stream, length)) = payload.split_last_chunk::<TRAILER>() else { bail!("it is too short") };
    let file = File::create_new(to)?;
    let mut child = Command::new("lz4")
        .args(["--decompress", "--stdout", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(file)
        .spawn()
        .context("starting lz4")?;
    let mut input = child.stdin.take().context("lz4 has no input")?;
    // Nothing is read back from it, so there is nobody to wait for each other.
    let fed = thread::scope(|scope| scope.spawn(move || input.write_all(stream)).join());
    let status = child.wait().context("waiting for lz4")?;
    ensure!(
        matches!(fed, Ok(Ok(()))) && status.success(),
        "lz4 cannot decompress it, and ended with {status}"
    );
    let mut file = File::open(to)?;
    let (found, wanted) = (file.metadata()?.len(), u64::from(u32::from_le_bytes(*length)));
    ensure!(found == wanted, "{found} bytes came out of it, and it says {wanted}");
    let mut start = [0; 4];
    file.read_exact(&mut start)?;
    ensure!(start == ELF, "what came out of it is no ELF file");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with that payload, whose set-up code has two sectors.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512 + 16];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        let good = image(b"compressed");
        assert_eq!(payload(&good), Some(&b"compressed"[..]));
        assert_eq!(payload(&good[..good.len() - 20]), None, "it is cut");
        let mut other = good.clone();
        other[0x202] = 0;
        assert_eq!(payload(&other), None, "it is no bzImage");
        assert_eq!(payload(b""), None);
    }

    #[test]
    fn what_comes_out_is_a_kernel_of_the_length_that_it_says() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = [ELF, &[7; 5000]].concat();
        let mut child = Command::new("lz4")
            .args(["-l", "-z", "-c", "-q"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&kernel).unwrap();
        let stream = child.wait_with_output().unwrap().stdout;
        assert!(stream.starts_with(LZ4_LEGACY));
        let with_length =
            |length: usize| [&stream[..], &u32::try_from(length).unwrap().to_le_bytes()].concat();
        let to = directory.path().join("good");
        decompress(&with_length(kernel.len()), &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), kernel);
        assert!(decompress(&with_length(kernel.len() + 1), &directory.path().join("longer")).is_err());
        let cut = &stream[..stream.len() / 2];
        assert!(decompress(&[cut, &[0; 4]].concat(), &directory.path().join("cut")).is_err());
    }

    #[test]
    fn a_directory_gets_it_once() {
        let directory = tempfile::tempdir().unwrap();
        let vmlinux = directory.path().join("of-the-cache");
        fs::write(&vmlinux, "kernel").unwrap();
        let bundle = directory.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        for _ in 0..2 {
            add_to(&bundle, &vmlinux).unwrap();
            assert_eq!(fs::read_to_string(bundle.join(FILE)).unwrap(), "kernel");
            assert_eq!(fs::read_dir(&bundle).unwrap().count(), 1);
        }
    }
}

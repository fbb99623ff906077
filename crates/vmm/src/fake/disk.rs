//! The root disk of a machine that is not there: the files that a VMM would have open. Nothing is written to
//! them but what their owner is told, their sizes and what they stand on, and one number as its guest's content.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
};

use camino::{Utf8Path, Utf8PathBuf};

use super::cannot;
use crate::{DiskFormat, DiskSpec, VmmError, VmmResult, qcow2, validate};

/// Overlays stand on each other, and a chain that does not end is a circle.
const DEEPEST: usize = 256;
/// Where the number is in a file: behind the longest header, in the cluster that it has for itself.
const NUMBER_AT: u64 = 32 << 10;

#[derive(Debug)]
pub(super) struct Disk {
    format: DiskFormat,
    /// The top first.
    chain: Vec<Utf8PathBuf>,
    /// What the guest sees; not known of a file that only pretends to be a disk.
    bytes: Option<u64>,
}

impl Disk {
    pub(super) fn open(spec: &DiskSpec) -> VmmResult<Self> {
        let file = File::open(&spec.path).map_err(cannot("open", &spec.path))?;
        let length = file.metadata().map_err(cannot("open", &spec.path))?.len();
        let mut chain = vec![spec.path.clone()];
        let mut bytes = Some(length);
        if spec.format == DiskFormat::Qcow2 {
            let mut header = qcow2::header(&spec.path).map_err(cannot("read", &spec.path))?;
            bytes = header.as_ref().map(|header| header.virtual_bytes);
            while let Some(base) = header.and_then(|header| header.backing_file)
                && chain.len() < DEEPEST
            {
                header = qcow2::header(&base).map_err(cannot("open", &base))?;
                chain.push(base);
            }
        }
        Ok(Self { format: spec.format, chain, bytes })
    }

    pub(super) fn chain(&self) -> Vec<Utf8PathBuf> {
        self.chain.clone()
    }

    pub(super) fn grow(&mut self, bytes: u64) -> VmmResult<()> {
        if let Some(present) = self.bytes
            && bytes < present
        {
            let problem = format!("it has {present} bytes already, and {bytes} are fewer");
            return Err(VmmError::Spec { field: "disk", problem });
        }
        let top = &self.chain[0];
        let file = OpenOptions::new().write(true).open(top).map_err(cannot("open", top))?;
        match (self.format, self.bytes) {
            (DiskFormat::Raw | DiskFormat::DmSnapshot, _) => {
                file.set_len(bytes).map_err(cannot("size", top))?
            }
            // Where a qcow2 file says its size.
            (DiskFormat::Qcow2, Some(_)) => {
                file.write_all_at(&bytes.to_be_bytes(), 24).map_err(cannot("size", top))?;
            }
            (DiskFormat::Qcow2, None) => {}
        }
        self.bytes = self.bytes.map(|_| bytes);
        Ok(())
    }

    pub(super) fn pivot(&mut self, overlay: &DiskSpec) -> VmmResult<()> {
        validate::overlay(overlay, &self.chain[0], self.bytes)?;
        self.format = overlay.format;
        self.chain.insert(0, overlay.path.clone());
        Ok(())
    }

    /// What its guest wrote last.
    pub(super) fn read(&self) -> io::Result<u64> {
        for path in &self.chain {
            let number = number_in(path)?;
            if number != 0 {
                return Ok(number);
            }
        }
        Ok(0)
    }

    pub(super) fn write(&self, number: u64) -> io::Result<()> {
        let top = OpenOptions::new().write(true).open(&self.chain[0])?;
        top.write_all_at(&number.to_le_bytes(), NUMBER_AT)
    }

    pub(super) fn stream(&mut self, base: &Utf8Path) -> VmmResult<()> {
        let at = validate::below_the_top(&self.chain, base)?;
        if at > 1 {
            let top = &self.chain[0];
            let number = self.chain[..at].iter().map(|path| number_in(path)).find(|it| !matches!(it, Ok(0)));
            if let Some(number) = number.transpose().map_err(cannot("read", top))? {
                self.write(number).map_err(cannot("write", top))?;
            }
            let named = qcow2::set_backing_file(top, &self.chain[at]);
            named.map_err(cannot("write", top))?;
            self.chain.drain(1..at);
        }
        Ok(())
    }
}

fn number_in(path: &Utf8Path) -> io::Result<u64> {
    let mut number = [0; 8];
    match File::open(path)?.read_exact_at(&mut number, NUMBER_AT) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        read => read.map(|()| u64::from_le_bytes(number)),
    }
}

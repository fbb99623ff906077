//! As much of the ELF format as the set-up asks about: is a program static, and what does a module depend on.

use anyhow::{Context as _, Result, bail, ensure};

const SEGMENT_DYNAMIC: u32 = 2;
const SEGMENT_INTERPRETER: u32 = 3;
const DYNAMIC_NEEDED: u64 = 1;

/// A 64-bit little-endian ELF file.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

impl<'a> Elf<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self> {
        ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
        Ok(Self { bytes })
    }

    /// Fails unless the program runs with nothing but a kernel: no interpreter, no needed library.
    pub(crate) fn assert_static(&self) -> Result<()> {
        for segment in self.table(32, 54)? {
            match number(segment, 0, 4)? {
                kind if kind == u64::from(SEGMENT_INTERPRETER) => {
                    bail!("it names a program interpreter (PT_INTERP)")
                }
                kind if kind == u64::from(SEGMENT_DYNAMIC) => {
                    let dynamic = slice(self.bytes, number(segment, 8, 8)?, number(segment, 32, 8)?)?;
                    for entry in dynamic.chunks_exact(16) {
                        ensure!(
                            number(entry, 0, 8)? != DYNAMIC_NEEDED,
                            "it needs a shared library (DT_NEEDED)"
                        );
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The value of `key` in a kernel module's own description.
    pub(crate) fn module_info(&self, key: &str) -> Result<Option<&'a str>> {
        let sections = self.table(40, 58)?;
        let names =
            *sections.get(usize::try_from(number(self.bytes, 62, 2)?)?).context("no section names")?;
        let names = section_content(self.bytes, names)?;
        for section in sections {
            let name =
                names.get(usize::try_from(number(section, 0, 4)?)?..).context("a section name is outside")?;
            if name.starts_with(b".modinfo\0") {
                return Ok(section_content(self.bytes, section)?
                    .split(|byte| *byte == 0)
                    .find_map(|entry| str::from_utf8(entry).ok()?.strip_prefix(key)?.strip_prefix('=')));
            }
        }
        bail!("it has no .modinfo section: not a kernel module")
    }

    /// The entries of a header table, whose offset and entry size are at the given places of the file header.
    fn table(&self, offset_at: usize, size_at: usize) -> Result<Vec<&'a [u8]>> {
        let offset = number(self.bytes, offset_at, 8)?;
        let (size, count) = (number(self.bytes, size_at, 2)?, number(self.bytes, size_at + 2, 2)?);
        ensure!(size > 0 || count == 0, "header entries of no size");
        let table = slice(self.bytes, offset, size * count)?;
        Ok(if size == 0 { Vec::new() } else { table.chunks_exact(usize::try_from(size)?).collect() })
    }
}

fn section_content<'a>(bytes: &'a [u8], section: &[u8]) -> Result<&'a [u8]> {
    slice(bytes, number(section, 24, 8)?, number(section, 32, 8)?)
}

fn slice(bytes: &[u8], offset: u64, length: u64) -> Result<&[u8]> {
    let end = offset.checked_add(length).context("a length overflows")?;
    bytes.get(usize::try_from(offset)?..usize::try_from(end)?).context("the file is cut short")
}

fn number(bytes: &[u8], at: usize, width: usize) -> Result<u64> {
    let bytes = bytes.get(at..at + width).context("the file is cut short")?;
    Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_dynamic() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let error = Elf::parse(&bytes).unwrap().assert_static().unwrap_err().to_string();
        assert!(error.contains("PT_INTERP"), "{error}");
    }

    #[test]
    fn no_input_panics() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        assert!(Elf::parse(b"#!/bin/sh").is_err());
        for length in (0..4096).chain([bytes.len() / 2]) {
            if let Ok(elf) = Elf::parse(&bytes[..length.min(bytes.len())]) {
                drop((elf.assert_static(), elf.module_info("depends")));
            }
        }
    }

    #[test]
    fn reads_what_a_module_says_about_itself() {
        // A file header, the string table of section names, the description, and two section headers.
        let names = b"\0.modinfo\0";
        let info = b"license=GPL\0depends=virtio_ring,virtio\0name=virtio_net\0";
        let mut file = vec![0_u8; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let (names_at, info_at) = (64, 64 + names.len());
        file.extend_from_slice(names);
        file.extend_from_slice(info);
        let headers_at = file.len();
        for (name, at, length) in [(0_u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut header = [0_u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[40..48].copy_from_slice(&(headers_at as u64).to_le_bytes());
        file[58..60].copy_from_slice(&64_u16.to_le_bytes());
        file[60..62].copy_from_slice(&2_u16.to_le_bytes());
        let elf = Elf::parse(&file).unwrap();
        assert_eq!(elf.module_info("depends").unwrap(), Some("virtio_ring,virtio"));
        assert_eq!(elf.module_info("alias").unwrap(), None);
    }
}

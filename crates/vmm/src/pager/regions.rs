//! Where a guest's memory is in its VMM: what Firecracker sends with the descriptor. Pure.

use serde::{Deserialize, Serialize};

/// How many parts a memory may have. A guest with a hole in its address space has two.
pub(super) const LIMIT: usize = 4;

/// A part of the memory: so many bytes from `offset` on are at `address`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Region {
    #[serde(rename = "base_host_virt_addr")]
    pub(super) address: u64,
    #[serde(rename = "size")]
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

/// As Firecracker sends it.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Sent {
    #[serde(flatten)]
    region: Region,
    page_size: u64,
}

/// Why what was sent cannot be the memory.
#[derive(Debug, thiserror::Error)]
pub enum RegionsError {
    /// It is not what Firecracker sends.
    #[error("it is no list of regions")]
    Malformed(#[source] serde_json::Error),
    /// There are none, or too many.
    #[error("{0} regions are none, or too many")]
    Count(usize),
    /// Its pages are not this host's.
    #[error("its pages have {0} bytes")]
    PageSize(u64),
    /// They are no whole pages, do not follow each other in the memory, or lie over each other in the process.
    #[error("region {0} is not where one can be")]
    Place(usize),
    /// Together they are not the memory.
    #[error("they have {found} bytes, and the memory has {wanted}")]
    Length {
        /// Of all.
        found: u64,
        /// Of the memory.
        wanted: u64,
    },
}

/// The parts of a memory: they follow each other in it, and are all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Regions {
    regions: Vec<Region>,
    page_bytes: u64,
}

impl Regions {
    /// Takes in what Firecracker sends.
    pub(super) fn parse(json: &[u8], memory_bytes: u64, page_bytes: u64) -> Result<Self, RegionsError> {
        let sent: Vec<Sent> = serde_json::from_slice(json).map_err(RegionsError::Malformed)?;
        if let Some(other) = sent.iter().find(|sent| sent.page_size != page_bytes) {
            return Err(RegionsError::PageSize(other.page_size));
        }
        Self::new(sent.into_iter().map(|sent| sent.region).collect(), memory_bytes, page_bytes)
    }

    pub(super) fn new(
        regions: Vec<Region>,
        memory_bytes: u64,
        page_bytes: u64,
    ) -> Result<Self, RegionsError> {
        if regions.is_empty() || regions.len() > LIMIT {
            return Err(RegionsError::Count(regions.len()));
        }
        let mut end = 0_u64;
        for (at, region) in regions.iter().enumerate() {
            let numbers = [region.address, region.bytes, region.offset];
            let is_whole = numbers.iter().all(|number| number.is_multiple_of(page_bytes));
            let last = region.address.checked_add(region.bytes);
            let is_apart = last.is_some_and(|last| {
                let overlaps = |other: &Region| other.address < last && region.address < other.end();
                !regions[..at].iter().any(overlaps)
            });
            if !is_whole || region.bytes == 0 || !is_apart || region.offset != end {
                return Err(RegionsError::Place(at));
            }
            end = end.checked_add(region.bytes).ok_or(RegionsError::Place(at))?;
        }
        if end != memory_bytes {
            return Err(RegionsError::Length { found: end, wanted: memory_bytes });
        }
        Ok(Self { regions, page_bytes })
    }

    pub(super) fn list(&self) -> &[Region] {
        &self.regions
    }

    /// How many pages the memory has.
    pub(super) fn pages(&self) -> u64 {
        self.regions.last().map_or(0, |region| (region.offset + region.bytes) / self.page_bytes)
    }

    /// The page that an address of the process is in.
    pub(super) fn page(&self, address: u64) -> Option<u64> {
        let region = self.regions.iter().find(|region| (region.address..region.end()).contains(&address))?;
        Some((region.offset + (address - region.address)) / self.page_bytes)
    }

    /// Where a page is in the process, and how many follow it there, itself included.
    pub(super) fn address(&self, page: u64) -> Option<(u64, u64)> {
        let offset = page.checked_mul(self.page_bytes)?;
        let holds = |region: &&Region| (region.offset..region.offset + region.bytes).contains(&offset);
        let region = self.regions.iter().find(holds)?;
        let into = offset - region.offset;
        Some((region.address + into, (region.bytes - into) / self.page_bytes))
    }

    /// The pages between two addresses of the process, those that are of the memory: of each part the first, and the first
    /// that is not any more.
    pub(super) fn pages_between(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().filter_map(move |region| {
            let (start, end) = (start.max(region.address), end.min(region.end()));
            let page = |address: u64| (region.offset + (address - region.address)) / self.page_bytes;
            (start < end).then(|| (page(start), page(end - 1) + 1))
        })
    }
}

impl Region {
    fn end(&self) -> u64 {
        // What goes beyond was refused.
        self.address.saturating_add(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    fn region(address: u64, pages: u64, first: u64) -> Region {
        Region { address: address * PAGE, bytes: pages * PAGE, offset: first * PAGE }
    }

    fn regions(list: &[Region], pages: u64) -> Result<Regions, RegionsError> {
        Regions::new(list.to_vec(), pages * PAGE, PAGE)
    }

    #[test]
    fn what_firecracker_sends_is_understood() {
        let json = br#"[{"base_host_virt_addr":139637976727552,"size":8192,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;
        let found = Regions::parse(json, 2 * PAGE, PAGE).unwrap();
        assert_eq!(found.list(), [Region { address: 139_637_976_727_552, bytes: 8192, offset: 0 }]);
        assert!(matches!(Regions::parse(json, PAGE, PAGE), Err(RegionsError::Length { found: 8192, .. })));
        let huge = String::from_utf8_lossy(json).replace("\"page_size\":4096", "\"page_size\":2097152");
        let huge = Regions::parse(huge.as_bytes(), 2 * PAGE, PAGE);
        assert!(matches!(huge, Err(RegionsError::PageSize(2_097_152))));
        for malformed in ["", "{}", "[1]", "[{\"size\":1}]"] {
            let refused = Regions::parse(malformed.as_bytes(), PAGE, PAGE);
            assert!(matches!(refused, Err(RegionsError::Malformed(_))), "{malformed}");
        }
        assert!(matches!(Regions::parse(b"[]", PAGE, PAGE), Err(RegionsError::Count(0))));
    }

    #[test]
    fn only_what_can_be_a_memory_is_taken() {
        let place = |list: &[Region], pages| match regions(list, pages) {
            Err(RegionsError::Place(at)) => at,
            other => panic!("{other:?}"),
        };
        assert!(regions(&[region(10, 3, 0), region(20, 2, 3)], 5).is_ok());
        assert!(
            regions(&[region(20, 3, 0), region(10, 2, 3)], 5).is_ok(),
            "the process may have them anywhere"
        );
        assert_eq!(place(&[region(10, 3, 0), region(12, 2, 3)], 5), 1, "they lie over each other");
        assert_eq!(place(&[region(10, 3, 0), region(20, 2, 4)], 5), 1, "something is missing");
        assert_eq!(place(&[region(10, 3, 1)], 3), 0);
        assert_eq!(place(&[region(10, 0, 0)], 0), 0);
        let odd = Region { address: 1, bytes: PAGE, offset: 0 };
        assert_eq!(place(&[odd], 1), 0);
        let beyond = Region { address: u64::MAX - PAGE + 1, bytes: 2 * PAGE, offset: 0 };
        assert_eq!(place(&[beyond], 2), 0);
        assert!(matches!(regions(&[region(10, 1, 0); 5], 5), Err(RegionsError::Count(5))));
    }

    proptest! {
        #[test]
        fn pages_and_addresses_are_each_others(sizes in prop::collection::vec((1_u64..20, 0_u64..9), 1..=LIMIT), probe in 0_u64..200) {
            let (mut list, mut first, mut address) = (Vec::new(), 0, 100);
            for (pages, gap) in sizes {
                list.push(region(address, pages, first));
                first += pages;
                address += pages + gap;
            }
            let found = regions(&list, first).unwrap();
            prop_assert_eq!(found.pages(), first);
            match found.address(probe) {
                Some((at, follow)) => {
                    prop_assert!(probe < first && follow > 0);
                    for more in 0..follow {
                        prop_assert_eq!(found.page(at + more * PAGE + PAGE - 1), Some(probe + more));
                    }
                }
                None => prop_assert!(probe >= first),
            }
            let (start, end) = (probe * PAGE, (probe + 17) * PAGE);
            let mut between: Vec<u64> = found.pages_between(start, end).flat_map(|(a, b)| a..b).collect();
            between.sort_unstable();
            let wanted: Vec<u64> = (0..first).filter(|page| (start..end).contains(&found.address(*page).unwrap().0)).collect();
            prop_assert_eq!(between, wanted);
            prop_assert_eq!(found.pages_between(end, start).count(), 0);
        }
    }
}

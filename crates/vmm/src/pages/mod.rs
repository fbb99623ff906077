//! The file in which a snapshot keeps the pages that differ from its base.
//!
//! ```text
//!  0            page size                                                      end
//!  ┌────────────┬──────────┬──────────┬─ ─ ─┬──────────┬───────┬───────┬─ ─ ─┐
//!  │ header     │ content of the pages, in the order of   │ run   │ run   │     │
//!  │            │ the runs, page by page                  │       │       │     │
//!  └────────────┴──────────┴──────────┴─ ─ ─┴──────────┴───────┴───────┴─ ─ ─┘
//! ```
//!
//! A *run* is a number of pages in a row that are all of one kind: with content, or zero and without. A page
//! that is in no run is as the base has it; so a page that became zero is always in one, but over a base that is
//! zero everywhere. Content begins at a multiple of the page size, so that it can be shared or mapped.
//!
//! The table comes last and the header is written after everything, so that one pass over a guest's memory
//! is enough, and a file that was not finished is none. The header's digest is over header and table; the
//! content is the caller's to digest, with the file.
//!
//! - `format`: the bytes, as pure functions.
//! - `file`: writing and reading them.

mod file;
mod format;

pub(crate) use self::file::{Origin, PagesWriter, SavedPages, Stretch, Zeros};

#[cfg(test)]
mod tests;

//! Where the time of creates and restores went. Pure.

use std::{collections::BTreeMap, fmt::Write as _};

/// What phases took, each time.
#[derive(Debug, Default)]
pub struct Phases {
    /// In the order in which they are gone through.
    order: Vec<String>,
    milliseconds: BTreeMap<String, Vec<f64>>,
}

impl Phases {
    /// Takes one time in.
    pub fn add(&mut self, phases: Vec<(String, f64)>) {
        for (name, milliseconds) in phases {
            if !self.milliseconds.contains_key(&name) {
                self.order.push(name.clone());
            }
            self.milliseconds.entry(name).or_default().push(milliseconds);
        }
    }

    /// Each phase with its median and its largest value.
    #[must_use]
    pub fn rows(&self) -> Vec<(&str, f64, f64)> {
        let mut rows = Vec::with_capacity(self.order.len());
        for name in &self.order {
            let mut sorted = self.milliseconds.get(name).cloned().unwrap_or_default();
            sorted.sort_by(f64::total_cmp);
            if let (Some(median), Some(largest)) =
                (sorted.get(sorted.len().saturating_sub(1) / 2), sorted.last())
            {
                rows.push((name.as_str(), *median, *largest));
            }
        }
        rows
    }

    /// Says it as a table, if there is something, below what it is.
    pub fn write(&self, text: &mut String, what: &str) {
        let rows = self.rows();
        if rows.is_empty() {
            return;
        }
        let _ = writeln!(text, "{what}, in milliseconds:\n");
        let _ = writeln!(text, "| phase | p50 | max |\n|---|---:|---:|");
        for (name, p50, max) in rows {
            let _ = writeln!(text, "| {name} | {p50:.1} | {max:.1} |");
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_summed_up_in_their_order() {
        let mut all = Phases::default();
        let mut text = String::new();
        all.write(&mut text, "Nothing");
        assert_eq!(text, "");
        all.add(vec![("slot".to_owned(), 1.0), ("restore".to_owned(), 40.5)]);
        all.add(vec![("slot".to_owned(), 3.0), ("restore".to_owned(), 20.0)]);
        all.add(vec![("slot".to_owned(), 2.0)]);
        assert_eq!(all.rows(), [("slot", 2.0, 3.0), ("restore", 20.0, 40.5)]);
        all.write(&mut text, "Where it went");
        assert!(text.starts_with("Where it went, in milliseconds:\n"), "{text}");
        assert!(text.ends_with("| slot | 2.0 | 3.0 |\n| restore | 20.0 | 40.5 |\n\n"), "{text}");
    }
}

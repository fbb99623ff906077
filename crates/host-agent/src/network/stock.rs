//! How many slots to make: the decision, apart from the making.

/// How many are made at the same time. Each needs a core for most of its time.
const AT_ONCE: usize = 4;

/// What there is, and what is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stock {
    /// Slots that nobody has.
    pub(super) ready: usize,
    /// Slots that are being made.
    pub(super) making: usize,
    /// Callers that wait for one.
    pub(super) waiting: usize,
    /// How many shall be ready when nobody waits.
    pub(super) target: usize,
}

impl Stock {
    /// How many to begin now. While `hold_back`, only those for which somebody waits.
    pub(super) fn to_make(self, hold_back: bool) -> usize {
        let wanted = self.waiting + if hold_back { 0 } else { self.target };
        let missing = wanted.saturating_sub(self.ready + self.making);
        missing.min(AT_ONCE.saturating_sub(self.making))
    }

    /// Whether fewer are ready, or will be, than shall be.
    pub(super) fn is_low(self) -> bool {
        self.ready + self.making < self.target + self.waiting
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn examples() {
        let stock = |ready, making, waiting, target| Stock { ready, making, waiting, target };
        assert_eq!(stock(0, 0, 0, 4).to_make(false), 4, "at the start");
        assert_eq!(stock(3, 0, 0, 4).to_make(true), 0, "not while a create is on its way");
        assert_eq!(stock(0, 0, 2, 4).to_make(true), 2, "unless somebody waits");
        assert_eq!(stock(0, 1, 1, 4).to_make(true), 0, "one is on its way");
        assert_eq!(stock(0, 4, 50, 4).to_make(false), 0, "no more at once");
    }

    proptest! {
        #[test]
        fn it_makes_enough_and_never_too_many(
            ready in 0_usize..50, waiting in 0_usize..50, target in 0_usize..50, hold_back: bool,
        ) {
            let mut stock = Stock { ready, making: 0, waiting, target };
            let mut made = 0;
            loop {
                let begin = stock.to_make(hold_back);
                prop_assert!(begin <= AT_ONCE);
                if begin == 0 { break; }
                made += begin;
                stock.ready += begin;
            }
            let wanted = waiting + if hold_back { 0 } else { target };
            prop_assert_eq!(made, wanted.saturating_sub(ready));
        }
    }
}

//! Whose rights machines have: a user of its own for each, from a range that is nobody's.
//!
//! A machine has the user of its slot, which it has for as long as it lives, and which no other machine of the host has at the
//! same time.

use crate::{
    config::Config,
    doctor::{IdRange, UIDS},
    network::SlotNumber,
};

/// The users of the machines of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Users {
    /// Machines run as the agent does, and see what it sees: for development.
    #[default]
    TheAgents,
    /// The first of a range in which there is one for each slot.
    From(u32),
}

/// Why machines cannot have users of their own, as they should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    /// There are more slots than users.
    #[error("the user ids {0} are too few: there have to be {needed}", needed = u32::from(SlotNumber::LAST.get()) + 1)]
    TooFew(IdRange),
    /// Others may start nothing as somebody else, whatever capabilities they have.
    #[error(
        "only root can start machines as other users: run the agent as root, or without --uids and --production"
    )]
    NotRoot,
}

impl Users {
    /// Those that an agent was told to use. Nobody who wants machines to be confined gets others.
    ///
    /// # Errors
    /// There are too few, or the agent is not root.
    pub fn of(config: &Config, is_root: bool) -> Result<Self, UsersError> {
        match config.uids.or_else(|| config.production.then_some(UIDS)) {
            None => Ok(Self::TheAgents),
            Some(range) if range.count() <= u64::from(SlotNumber::LAST.get()) => {
                Err(UsersError::TooFew(range))
            }
            Some(_) if !is_root => Err(UsersError::NotRoot),
            Some(range) => Ok(Self::From(range.first)),
        }
    }

    /// The user of the machine in a slot; none where machines are not confined.
    #[must_use]
    pub fn in_slot(self, slot: SlotNumber) -> Option<u32> {
        match self {
            Self::TheAgents => None,
            Self::From(first) => Some(first + u32::from(slot.get())),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        config: Config,
    }

    fn users(words: &[&str], is_root: bool) -> Result<Users, UsersError> {
        let line = Line::try_parse_from([&["agent"], words].concat()).unwrap();
        Users::of(&line.config, is_root)
    }

    #[test]
    fn each_slot_has_a_user_where_there_are_some() {
        assert_eq!(users(&[], true), Ok(Users::TheAgents));
        for words in [&["--uids", "2000000-2032767"][..], &["--production"]] {
            assert_eq!(users(words, false), Err(UsersError::NotRoot), "{words:?}");
        }
        let few = users(&["--uids", "2000000-2032766"], true);
        assert!(matches!(few, Err(UsersError::TooFew(_))), "{few:?}");
        let users = users(&["--uids", "2000000-2032767"], true).unwrap();
        assert_eq!(users.in_slot(SlotNumber::FIRST), Some(2_000_001));
        assert_eq!(users.in_slot(SlotNumber::LAST), Some(2_032_767));
        assert_eq!(Users::TheAgents.in_slot(SlotNumber::LAST), None);
        assert_eq!(super::Users::From(UIDS.first), self::users(&["--production"], true).unwrap());
    }
}

//! Who asks.
//!
//! A key that was found is remembered for a few seconds, so that the database is not asked for each of many
//! requests in a row. A key that was not found is never remembered, and a revoked one works for no longer
//! than [`REMEMBERED`].

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;
use uuid::Uuid;
use wrenn_types::{ApiKey, TeamId};

use super::{Core, CoreError};

/// How long a key that was found is good without asking again.
const REMEMBERED: Duration = Duration::from_secs(5);
/// How many keys are remembered.
const ROOM: usize = 4096;

/// Who asks, by the key that was shown.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) team: TeamId,
    pub(crate) key: Uuid,
    pub(crate) key_name: String,
}

/// The keys that were found lately.
#[derive(Debug, Default)]
pub(crate) struct KnownKeys {
    // A plain mutex: it is held for one look-up, never across an await.
    keys: Mutex<HashMap<[u8; 32], (Caller, Instant)>>,
}

impl KnownKeys {
    fn find(&self, hash: &[u8; 32], now: Instant) -> Option<Caller> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (caller, found_at) = keys.get(hash)?;
        (now.duration_since(*found_at) < REMEMBERED).then(|| caller.clone())
    }

    fn remember(&self, hash: [u8; 32], caller: Caller, now: Instant) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= ROOM {
            keys.retain(|_, (_, found_at)| now.duration_since(*found_at) < REMEMBERED);
        }
        if keys.len() < ROOM {
            keys.insert(hash, (caller, now));
        }
    }
}

impl Core {
    /// Whose key this is.
    pub(crate) async fn authenticate(&self, shown: Option<&[u8]>) -> Result<Caller, CoreError> {
        let shown = shown.ok_or(CoreError::NoKey)?;
        let text = std::str::from_utf8(shown).map_err(|_| CoreError::UnknownKey)?;
        let key: ApiKey = text.parse().map_err(|_| CoreError::UnknownKey)?;
        let hash: [u8; 32] = Sha256::digest(key.expose().as_bytes()).into();
        let now = Instant::now();
        let caller = match self.keys.find(&hash, now) {
            Some(caller) => caller,
            None => {
                let row = self.store.key_by_hash(hash).await?.ok_or(CoreError::UnknownKey)?;
                // The index of the database has compared already, in its own time; what decides is this.
                if !bool::from(row.hash.ct_eq(&hash)) {
                    return Err(CoreError::UnknownKey);
                }
                let caller = Caller { team: row.team, key: row.id, key_name: row.name };
                self.keys.remember(hash, caller.clone(), now);
                caller
            }
        };
        self.recorder.key_used(caller.key);
        Ok(caller)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_forgotten_in_time_and_never_grow_without_bound() {
        let known = KnownKeys::default();
        let caller = Caller { team: TeamId::new(), key: Uuid::now_v7(), key_name: "test".to_owned() };
        let start = Instant::now();
        known.remember([1; 32], caller.clone(), start);
        assert!(known.find(&[1; 32], start + REMEMBERED / 2).is_some());
        assert!(known.find(&[1; 32], start + REMEMBERED).is_none());
        assert!(known.find(&[2; 32], start).is_none());
        for number in 0..2 * ROOM as u64 {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&number.to_le_bytes());
            known.remember(hash, caller.clone(), start);
        }
        assert!(known.keys.lock().unwrap().len() <= ROOM);
        known.remember([9; 32], caller, start + REMEMBERED);
        assert_eq!(known.keys.lock().unwrap().len(), 1);
    }
}

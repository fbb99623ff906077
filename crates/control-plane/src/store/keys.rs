//! Teams and their API keys.

use sha2::{Digest as _, Sha256};
use uuid::Uuid;
use wrenn_types::{ApiKey, TeamId};

use super::{Store, StoreError};

/// A key that the database knows.
#[derive(Debug, Clone)]
pub(crate) struct KeyRow {
    pub(crate) id: Uuid,
    pub(crate) team: TeamId,
    pub(crate) name: String,
    pub(crate) hash: [u8; 32],
}

/// What the database keeps of a key.
pub(crate) fn hash(key: &ApiKey) -> [u8; 32] {
    Sha256::digest(key.expose().as_bytes()).into()
}

impl Store {
    /// The key with this hash.
    pub(crate) async fn key_by_hash(&self, hash: [u8; 32]) -> Result<Option<KeyRow>, StoreError> {
        let row = self
            .run("look up an API key", || {
                sqlx::query!(
                    "SELECT id, team_id, name, key_hash FROM api_keys WHERE key_hash = $1",
                    hash.as_slice()
                )
                .fetch_optional(&self.pool)
            })
            .await?;
        Ok(row.map(|row| KeyRow {
            id: row.id,
            team: TeamId(row.team_id),
            name: row.name,
            hash: row.key_hash.try_into().unwrap_or_default(),
        }))
    }

    /// Notes that these keys were used now.
    pub(crate) async fn touch_keys(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        self.run("note the use of API keys", || {
            sqlx::query!("UPDATE api_keys SET last_used = now() WHERE id = ANY($1)", ids).execute(&self.hasty)
        })
        .await
        .map(drop)
    }
}

/// The team `default` and a key for it, if there is no team yet. Of several control planes that start at
/// once only one makes them.
pub(crate) async fn first_key(store: &Store) -> Result<Option<ApiKey>, StoreError> {
    let key = ApiKey::random();
    let (team, id) = (TeamId::new().0, Uuid::now_v7());
    let hash = hash(&key);
    let made = store
        .run("make the first team", || {
            sqlx::query!(
                "WITH team AS (
                     INSERT INTO teams (id, name) SELECT $1, 'default' WHERE NOT EXISTS (SELECT FROM teams)
                     ON CONFLICT DO NOTHING RETURNING id
                 )
                 INSERT INTO api_keys (id, team_id, name, key_hash, key_prefix)
                 SELECT $2, team.id, 'first', $3, $4 FROM team",
                team,
                id,
                hash.as_slice(),
                key.prefix(),
            )
            .execute(&store.pool)
        })
        .await?;
    Ok((made.rows_affected() == 1).then_some(key))
}

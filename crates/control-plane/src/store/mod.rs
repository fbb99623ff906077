//! The database: the only place that outlives the process.
//!
//! Every statement is bounded: it is tried again over a fresh connection while the server is restarting or
//! its connections have gone stale, and once [`Store::bound`] has passed the caller is told that the
//! database does not answer. For that to be right, every statement here is safe to repeat: reads,
//! compare-and-set updates, and inserts that do nothing where the row is there already.
//!
//! A commit that waits for the disk takes milliseconds, so a create waits for none. Its row is written
//! without waiting, is made durable by [`Store::flush`] while the host works, and that the sandbox runs can
//! be told again by its host should the database lose it. What nobody else could tell again waits.

mod audit;
mod hosts;
mod keys;
mod persist;
mod sandboxes;
mod snapshots;

use std::{collections::BTreeMap, str::FromStr as _, time::Duration};

use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::{Instant, sleep, timeout_at};

pub(crate) use audit::AuditEntry;
pub(crate) use hosts::HostRow;
pub(crate) use keys::first_key;
pub(crate) use persist::Seen;
pub(crate) use sandboxes::{Cursor, ListFilter, NewSandbox, SandboxRow};
pub(crate) use snapshots::{Made, NewSnapshot, SnapshotRow};

/// What a sandbox may reach.
pub(crate) type Policy = sqlx::types::Json<wrenn_types::NetworkPolicy>;

/// Names and values that a caller gave a sandbox.
pub(crate) type Metadata = sqlx::types::Json<BTreeMap<String, String>>;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("../../migrations");

/// How long to wait before a failed statement is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Why a statement gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL of the database is not one.
    #[error("the database URL cannot be used")]
    BadUrl(#[source] sqlx::Error),
    /// Nothing answered within the bound.
    #[error("the database does not answer ({operation})")]
    Unavailable {
        /// What was to be done.
        operation: &'static str,
        /// The last failure, if there was one before the time ran out.
        #[source]
        source: Option<sqlx::Error>,
    },
    /// The database refused the statement.
    #[error("the database refused to {operation}")]
    Refused {
        /// What was to be done.
        operation: &'static str,
        /// What it said.
        #[source]
        source: sqlx::Error,
    },
    /// A row holds what cannot be understood.
    #[error("a row of the database cannot be understood")]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The schema could not be brought up to date.
    #[error("the database could not be migrated")]
    Migrate(#[source] sqlx::migrate::MigrateError),
}

/// A pool of connections and the statements that go over it.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pool: PgPool,
    /// Connections whose commits do not wait for the disk: a crash of the database can lose the last of
    /// them, in the order in which they were made.
    hasty: PgPool,
    bound: Duration,
}

impl Store {
    /// Connects, waiting up to `patience` for a database that is still starting, and brings the schema up
    /// to date.
    pub(crate) async fn open(url: &str, bound: Duration, patience: Duration) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(StoreError::BadUrl)?
            .application_name("wrenn")
            // The bound of the client ends the wait; this ends the work.
            .options([("statement_timeout", bound.as_millis().to_string())]);
        let pool_options = PgPoolOptions::new()
            .max_connections(16)
            .acquire_timeout(bound)
            .idle_timeout(Duration::from_secs(600))
            // A check before each use would cost a round trip per statement. A stale connection shows
            // itself by failing, and the statement is then tried again.
            .test_before_acquire(false);
        let hasty = options.clone().options([("synchronous_commit", "off")]);
        let hasty = pool_options.clone().connect_lazy_with(hasty);
        let store = Self { pool: pool_options.connect_lazy_with(options), hasty, bound };
        store.with_bound(patience).run("connect", || sqlx::query("SELECT 1").execute(&store.pool)).await?;
        MIGRATIONS.run(&store.pool).await.map_err(StoreError::Migrate)?;
        Ok(store)
    }

    /// Waits for the statements in flight and closes the connections.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
        self.hasty.close().await;
    }

    /// The same database with another bound: background work can wait longer than a request.
    pub(crate) fn with_bound(&self, bound: Duration) -> Self {
        Self { bound, ..self.clone() }
    }

    /// Waits until everything that was committed before is on the disk.
    pub(crate) async fn flush(&self) -> Result<(), StoreError> {
        // A message that nobody reads, in a transaction that waits: the log is one sequence.
        self.run("flush the log", || {
            sqlx::query!("SELECT pg_logical_emit_message(true, 'wrenn', '')::text").fetch_one(&self.pool)
        })
        .await
        .map(drop)
    }

    async fn run<T, Fut>(&self, operation: &'static str, attempt: impl Fn() -> Fut) -> Result<T, StoreError>
    where
        Fut: Future<Output = sqlx::Result<T>>,
    {
        let deadline = Instant::now() + self.bound;
        let mut last = None;
        loop {
            match timeout_at(deadline, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(source)) if is_passing(&source) && Instant::now() + RETRY_PAUSE < deadline => {
                    last = Some(source);
                    sleep(RETRY_PAUSE).await;
                }
                Ok(Err(source)) if is_passing(&source) => {
                    return Err(StoreError::Unavailable { operation, source: Some(source) });
                }
                Ok(Err(source)) => return Err(StoreError::Refused { operation, source }),
                Err(_) => return Err(StoreError::Unavailable { operation, source: last }),
            }
        }
    }
}

/// Whether the same statement may well succeed a moment later.
fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Protocol(_) => true,
        // Class 57 is the operator's doing (shutdown, crash, still starting), 53 a lack of connections,
        // 40 a conflict between transactions, 08 a broken connection.
        sqlx::Error::Database(database) => database
            .code()
            .is_some_and(|code| ["57P", "53", "40", "08"].iter().any(|class| code.starts_with(class))),
        _ => false,
    }
}

//! Connections that have changed their protocol: bytes in both directions, whatever they mean.
//!
//! ```text
//! caller ◄──► this ◄──► tunnel ◄──► the program in the guest
//!   ends sending ─────────────────► its input ends; what it still says is carried
//!                 ◄──────────────── it ends sending: so does this, if the sandbox still runs
//!   both cut      ◄──────────────── the sandbox is paused or killed, or one side breaks
//! ```

use std::{io, pin::Pin};

use futures::future::BoxFuture;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::silence::Silence;

/// Bytes carried at once in each direction.
const BUFFER: usize = 32 * 1024;

/// Carries until both directions have ended, one side breaks, the sandbox ends, or nothing is said for too long.
pub(super) async fn carry(
    caller: OnUpgrade,
    guest: Upgraded,
    silence: Silence,
    runs: impl FnOnce() -> BoxFuture<'static, bool>,
) {
    tokio::select! {
        carried = async {
            let caller = caller.await.map_err(io::Error::other)?;
            pipe(TokioIo::new(caller), TokioIo::new(guest), &silence, runs).await
        } => {
            if let Err(error) = carried {
                tracing::debug!(error = &error as &dyn std::error::Error, "an upgraded connection broke");
            }
        }
        () = silence.too_long() => tracing::debug!("an upgraded connection was silent for too long"),
    }
}

async fn pipe(
    caller: impl AsyncRead + AsyncWrite,
    guest: impl AsyncRead + AsyncWrite,
    silence: &Silence,
    runs: impl FnOnce() -> BoxFuture<'static, bool>,
) -> io::Result<()> {
    let (caller_read, mut caller_write) = tokio::io::split(caller);
    let (guest_read, mut guest_write) = tokio::io::split(guest);
    let up = async {
        copy(caller_read, &mut guest_write, silence).await?;
        guest_write.shutdown().await
    };
    let down = async {
        copy(guest_read, &mut caller_write, silence).await?;
        // A sandbox that is paused or killed ends like this as well, and its caller must not take that for a good end.
        if !runs().await {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        caller_write.shutdown().await
    };
    // The first error drops all four halves.
    tokio::try_join!(up, down).map(drop)
}

async fn copy(from: impl AsyncRead, mut to: impl AsyncWrite + Unpin, silence: &Silence) -> io::Result<()> {
    let mut from: Pin<Box<_>> = Box::pin(from);
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        silence.broken();
        to.write_all(&buffer[..length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::duplex;

    use super::*;

    const SILENCE: Duration = Duration::from_secs(60);

    fn answered(runs: bool) -> impl FnOnce() -> BoxFuture<'static, bool> {
        move || Box::pin(std::future::ready(runs))
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let ((mut caller, near), (far, mut guest)) = (duplex(16), duplex(16));
        let silence = Silence::new(SILENCE);
        let piped = async { pipe(near, far, &silence, answered(true)).await };
        let talk = async {
            let question = vec![b'q'; 100_000];
            let (sent, heard) = tokio::join!(
                async {
                    caller.write_all(&question).await?;
                    caller.shutdown().await
                },
                async {
                    let mut heard = Vec::new();
                    guest.read_to_end(&mut heard).await.map(|_| heard)
                }
            );
            sent.unwrap();
            assert_eq!(heard.unwrap(), question);
            // The caller has ended, and is still answered.
            guest.write_all(b"answer").await.unwrap();
            guest.shutdown().await.unwrap();
            let mut answer = String::new();
            caller.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "answer");
        };
        let (piped, ()) = tokio::join!(piped, talk);
        piped.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_a_sandbox_cuts_both_directions() {
        let ((mut caller, near), (far, guest)) = (duplex(16), duplex(16));
        drop(guest);
        let silence = Silence::new(SILENCE);
        assert!(pipe(near, far, &silence, answered(false)).await.is_err());
        // Not only the one direction that the guest ended: nobody waits for the caller's end.
        assert!(caller.write_all(b"more").await.is_err());
    }
}

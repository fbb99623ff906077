//! What can go wrong with a driver, named by the operation.

use std::{io, time::Duration};

use camino::Utf8PathBuf;

use crate::ExitReason;

/// The result of an operation on a VMM.
pub type VmmResult<T> = Result<T, VmmError>;

/// An operation on a VMM that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// The program is not there or is not one that can be driven.
    #[error("{program} cannot be used: {problem}; {remedy}")]
    Unavailable {
        /// The program's name or path.
        program: String,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The process could not be started.
    #[error("could not start {program}")]
    Spawn {
        /// The program's path.
        program: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the machine could not be read or written.
    #[error("could not {operation} {path}")]
    File {
        /// What was to be done, as a verb.
        operation: &'static str,
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM's control socket was lost or said something that is not its protocol.
    #[error("lost the control connection during {command}")]
    Connection {
        /// The command that was under way.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM refused a command.
    #[error("the VMM refused {command}: {message}")]
    Refused {
        /// The command.
        command: String,
        /// What it answered.
        message: String,
    },
    /// The process ended while something was under way.
    #[error("the VMM ended during {operation}: {reason:?}")]
    Exited {
        /// What was under way.
        operation: &'static str,
        /// Why it ended.
        reason: ExitReason,
    },
    /// The bound of an operation ran out.
    #[error("{operation} took longer than {bound:?}")]
    Timeout {
        /// What was under way.
        operation: &'static str,
        /// How long it may take.
        bound: Duration,
    },
    /// There is no process of this machine to adopt.
    #[error("there is no VMM process of the machine {name}")]
    NotThere {
        /// The machine's name.
        name: String,
    },
    /// The operation is not possible in the state in which the machine is.
    #[error("{operation} is not possible while the machine is {state}")]
    WrongState {
        /// What was asked for.
        operation: &'static str,
        /// The state it is in.
        state: &'static str,
    },
    /// This driver cannot do it with this machine.
    #[error("{operation} is not possible with this machine: {problem}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// What stands against it.
        problem: &'static str,
    },
    /// The machine is described in a way that no machine can be.
    #[error("{field} of the machine is not valid: {problem}")]
    Spec {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

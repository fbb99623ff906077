//! Processes that outlive their parent: started in a session, a network namespace and a user of their own.

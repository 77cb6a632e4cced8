//! Room for what comes.

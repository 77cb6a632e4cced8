//! The options that all commands share, and what a command line must not hold.

use std::ffi::OsString;
use std::future::Future;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use credbroker_client::{AdminClient, AdminPacketClient, Client, ClientBuilder, Error};
use tokio::runtime;

use crate::audit::Audit;
use crate::completions::Completions;
use crate::delete::Delete;
use crate::entry::Entry;
use crate::exec::Exec;
use crate::explain::Explain;
use crate::failure::{Exit, Failure};
use crate::handle::Handle;
use crate::output::Output;
use crate::put::Put;
use crate::resume::Resume;
use crate::sessions::Sessions;
use crate::show::Show;
use crate::suspend::Suspend;
use crate::validate::Validate;

const TOKEN_PREFIX: &[u8] = b"cbh_";

/// Uses database credentials through the credential broker, without seeing them
#[derive(Debug, Parser)]
#[command(name = "credbroker", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Debug)]
pub(crate) struct Global {
    /// Directory of the broker's sockets [default: $CREDBROKER_RUNTIME_DIR, else
    /// /run/credbroker, else $XDG_RUNTIME_DIR/credbroker]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) runtime_dir: Option<PathBuf>,
    /// Directory of the operators' sockets [default: $CREDBROKER_ADMIN_DIR, else the other
    /// directory with -admin behind its name]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) admin_dir: Option<PathBuf>,
    /// How to print results and errors
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Exec(Exec),
    Handle(Handle),
    /// Show whom the broker takes you for, and which grants match
    Whoami,
    /// List the connections that you may use
    List,
    /// Show the state of the broker (operators)
    Status,
    Show(Show),
    Put(Put),
    Entry(Entry),
    Delete(Delete),
    Validate(Validate),
    Suspend(Suspend),
    Resume(Resume),
    Sessions(Sessions),
    Explain(Explain),
    Audit(Audit),
    /// Make the broker read its configuration again, whole or not at all (operators)
    Reload,
    Completions(Completions),
}

impl Global {
    fn builder(&self) -> ClientBuilder {
        let mut builder = Client::builder();
        if let Some(directory) = &self.runtime_dir {
            builder = builder.runtime_dir(directory);
        }
        if let Some(directory) = &self.admin_dir {
            builder = builder.admin_dir(directory);
        }
        builder
    }

    pub(crate) async fn connect(&self) -> Result<Client, Error> {
        self.builder().connect().await
    }

    pub(crate) async fn connect_admin_packet(&self) -> Result<AdminPacketClient, Error> {
        self.builder().connect_admin_packet().await
    }

    pub(crate) async fn connect_admin(&self) -> Result<AdminClient, Error> {
        self.builder().connect_admin().await
    }

    /// Connects as an operator and runs `work`.
    pub(crate) fn with_admin<T, F>(&self, work: impl FnOnce(AdminClient) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        block_on(async { work(self.connect_admin().await?).await })
    }

    /// Connects, runs `work`, and waits until whatever it dropped is revoked.
    pub(crate) fn with_client<T, F>(&self, work: impl FnOnce(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        block_on(async {
            let client = self.connect().await?;
            let result = work(client.clone()).await;
            client.close().await;
            result
        })
    }
}

/// Runs `work` on this thread: the kernel ties a child to the thread that made it.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::system("cannot start", &error))?.block_on(work)
}

/// Refuses our own arguments, up to `--`, if one holds a handle token. The text does not
/// repeat it; clap's own errors would.
pub(crate) fn refuse_tokens(arguments: impl Iterator<Item = OsString>) -> Result<(), Failure> {
    let mut ours = arguments.take_while(|argument| argument != "--");
    let has_token = |argument: OsString| {
        let bytes = argument.as_bytes();
        bytes.windows(TOKEN_PREFIX.len()).any(|window| window == TOKEN_PREFIX)
    };
    if ours.any(has_token) {
        return Err(Failure::new(
            Exit::Usage,
            "USAGE",
            "a handle token does not belong on a command line, which every user can read: \
             name the handle by its id (hdl_…), or give the token on standard input with `-`",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn check(arguments: &[&str]) -> Result<(), Failure> {
        refuse_tokens(arguments.iter().map(OsString::from))
    }

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn tokens_are_refused_wherever_they_stand() {
        let token = "cbh_0123456789012345678901234567890123456789abc";
        for arguments in [
            vec!["handle", "revoke", token],
            vec!["handle", "revoke", "hdl_a", token],
            vec!["exec", "main_db", "--env", &format!("X={token}"), "--", "true"],
        ] {
            let failure = check(&arguments).unwrap_err();
            let text = format!("{failure:?}");
            assert!(text.contains("every user can read"), "{text}");
            assert!(!text.contains(token), "{text}");
        }
    }

    #[test]
    fn the_command_of_exec_is_not_ours_to_judge() {
        check(&["handle", "revoke", "hdl_abcdefghijklmnop"]).unwrap();
        check(&["exec", "main_db", "--", "echo", "cbh_"]).unwrap();
    }
}

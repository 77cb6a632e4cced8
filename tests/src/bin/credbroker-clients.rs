//! tokio-postgres and sqlx as programs for `tests/clients.sh`: the same calls direct and through the
//! door, and a transcript that must be the same. Which driver is the first argument; where to connect
//! to is told by `PGHOST` and its like.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program that prints")]

use std::collections::HashSet;
use std::error::Error;
use std::fmt::Debug;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

/// A pool lives for more than this many lifetimes of a handle.
const LIFETIMES: usize = 3;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some("tokio-postgres") => raw::run().await,
        Some("sqlx") => pooled::run().await,
        Some(_) | None => Err("tokio-postgres or sqlx?".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One line of the transcript.
fn say(check: &str, value: impl Debug) {
    println!("{check}: {value:?}");
}

/// What may differ. It is shown beside the verdict.
fn note(text: &str) {
    eprintln!("note: {text}");
}

fn variable(name: &str) -> Outcome<String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}").into())
}

/// How long a pool is used. Where nothing expires, less than the default may do.
fn outliving() -> Duration {
    let seconds = std::env::var("CLIENTS_POOL_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(7))
}

/// A new handle, for one new connection.
async fn token() -> Outcome<String> {
    #[derive(Deserialize)]
    struct Issued {
        token: String,
    }
    let command = std::env::var("CLIENTS_TOKEN_COMMAND")
        .unwrap_or_else(|_unset| "credbroker --output json handle issue main_db".to_owned());
    let mut words = command.split(' ');
    let mut issue = tokio::process::Command::new(words.next().ok_or("no command")?);
    let printed = issue.args(words).stderr(Stdio::inherit()).output().await?;
    Ok(serde_json::from_slice::<Issued>(&printed.stdout)?.token)
}

/// Counts what a pool does until more than three lifetimes have passed.
#[derive(Default)]
struct Outliving {
    backends: HashSet<i32>,
    answers: usize,
    cut: usize,
}

impl Outliving {
    fn answered(&mut self, backend: i32) {
        self.backends.insert(backend);
        self.answers += 1;
    }

    fn cut(&mut self, error: &dyn Error) {
        self.cut += 1;
        note(&format!("cut in the middle: {error}"));
    }

    fn finish(&self) {
        let (backends, answers) = (self.backends.len(), self.answers);
        let expires = std::env::var("CLIENTS_EXPIRES").is_ok_and(|set| set == "1");
        let enough = if expires { backends > LIFETIMES } else { backends == 1 };
        let verdict = if enough && answers > 5 {
            "ok".to_owned()
        } else {
            format!("{backends} backends, {answers} answers")
        };
        say("pool: outlives three lifetimes", verdict);
        say("pool: errors that a retry does not mend", 0);
        note(&format!("{backends} backends, {} errors seen", self.cut));
    }
}

mod raw {
    use std::pin::pin;

    use futures_util::{SinkExt as _, StreamExt as _, TryStreamExt as _, future};
    use sha2::{Digest as _, Sha256};
    use tokio_postgres::error::DbError;
    use tokio_postgres::types::Type;
    use tokio_postgres::{
        AsyncMessage, Client, Config, Error as Failed, NoTls, SimpleQueryMessage,
    };

    use super::{Duration, Instant, Outcome, Outliving, note, outliving, say, token, variable};

    pub(super) async fn run() -> Outcome {
        note("version 0.7");
        let (client, mut messages) = connect(&config()?).await?;
        values(&client).await?;
        transactions(&client).await?;
        errors(&client).await?;
        copies(&client).await?;
        large(&client).await?;
        cancels(&client).await?;
        client
            .batch_execute(
                "DO $$ BEGIN FOR n IN 1..200 LOOP RAISE NOTICE 'number %', n; END LOOP; END $$;
                 LISTEN news; SELECT pg_notify('news', repeat('n', 7000))",
            )
            .await?;
        let mut notices = Vec::new();
        while let Some(message) = messages.recv().await {
            match message {
                AsyncMessage::Notice(notice) => notices.push(notice.message().to_owned()),
                AsyncMessage::Notification(news) => {
                    say("notices", (notices.len(), notices.first(), notices.last()));
                    say("notification", (news.channel(), news.payload().len()));
                    break;
                }
                _ => {}
            }
        }
        drop(client);
        startup_and_end().await?;
        pool().await
    }

    fn config() -> Outcome<Config> {
        let mut config = Config::new();
        config
            .host_path(variable("PGHOST")?)
            .port(variable("PGPORT")?.parse()?)
            .user(variable("PGUSER")?)
            .password(variable("PGPASSWORD")?)
            .dbname(variable("PGDATABASE")?);
        Ok(config)
    }

    type Messages = tokio::sync::mpsc::UnboundedReceiver<AsyncMessage>;

    #[allow(clippy::disallowed_methods, reason = "the rule is the broker's; this is a client")]
    async fn connect(config: &Config) -> Outcome<(Client, Messages)> {
        let (client, mut connection) = config.connect(NoTls).await?;
        let (sender, messages) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = future::poll_fn(|cx| connection.poll_message(cx)).await {
                let _nobody_listens = sender.send(message);
            }
        });
        Ok((client, messages))
    }

    /// What a server said in an error.
    fn told(error: &Failed) -> Option<(String, &str, Option<&str>)> {
        let said: Option<&DbError> = error.as_db_error();
        said.map(|said| (said.code().code().to_owned(), said.message(), said.constraint()))
    }

    async fn values(client: &Client) -> Outcome {
        let row = client
            .query_one(
                "SELECT $1::int8, $2::float8, $3::bool, $4::text, $5::bytea, $6::int4[], $7::text",
                &[
                    &i64::MAX,
                    &0.1_f64,
                    &true,
                    &"aé漢😀",
                    &(0..=255).collect::<Vec<u8>>(),
                    &vec![Some(1_i32), None, Some(3)],
                    &None::<String>,
                ],
            )
            .await?;
        say("int8", row.try_get::<_, i64>(0)?);
        say("float8", row.try_get::<_, f64>(1)?);
        say("bool", row.try_get::<_, bool>(2)?);
        say("text", row.try_get::<_, String>(3)?);
        say("bytea", row.try_get::<_, Vec<u8>>(4)?);
        say("int4[]", row.try_get::<_, Vec<Option<i32>>>(5)?);
        say("null", row.try_get::<_, Option<String>>(6)?);
        let twice = client.prepare_typed("SELECT $1 * 2", &[Type::INT4]).await?;
        say("prepared", twice.columns());
        for number in 0..8 {
            let row = client.query_one(&twice, &[&number]).await?;
            say("prepared", row.try_get::<_, i32>(0)?);
        }
        let numbers: Vec<i32> = (0..500).collect();
        let pipelined = numbers.iter().map(|number| async {
            client.query_one(&twice, &[number]).await?.try_get::<_, i32>(0)
        });
        say("pipelined", future::try_join_all(pipelined).await?.iter().sum::<i32>());
        let messages = client.simple_query("SELECT 1 AS a; SELECT NULL; SELECT 'x'").await?;
        for message in &messages {
            if let SimpleQueryMessage::Row(row) = message {
                say("simple", row.get(0));
            }
        }
        Ok(())
    }

    async fn transactions(client: &Client) -> Outcome {
        client
            .batch_execute(
                "CREATE TEMP TABLE t (id int PRIMARY KEY, name text);
                 BEGIN; INSERT INTO t VALUES (1, 'one'); SAVEPOINT a",
            )
            .await?;
        let again = client.execute("INSERT INTO t VALUES (1, 'again')", &[]).await;
        say("unique violation", again.as_ref().err().and_then(told));
        let failed = client.execute("SELECT 1", &[]).await;
        say("in a failed transaction", failed.as_ref().err().and_then(told));
        client.batch_execute("ROLLBACK TO a; COMMIT").await?;
        let row = client.query_one("SELECT count(*) FROM t", &[]).await?;
        say("committed", row.try_get::<_, i64>(0)?);
        Ok(())
    }

    async fn errors(client: &Client) -> Outcome {
        for sql in ["SELEC 1", "SELECT 1/0", "SELECT * FROM nothing", "SELECT 'x'::int"] {
            say(sql, client.query(sql, &[]).await.as_ref().err().and_then(told));
        }
        client.batch_execute("SET statement_timeout = 50").await?;
        let late = client.query("SELECT pg_sleep(10)", &[]).await;
        say("statement_timeout", late.as_ref().err().and_then(told));
        client.batch_execute("RESET statement_timeout").await?;
        Ok(())
    }

    async fn copies(client: &Client) -> Outcome {
        client.batch_execute("CREATE TEMP TABLE c (n int, text text)").await?;
        let mut sink = pin!(client.copy_in::<_, &[u8]>("COPY c FROM STDIN").await?);
        let rows: String = (0..100_000).map(|n| format!("{n}\trow {n}\n")).collect();
        let rows: &'static str = rows.leak();
        for part in rows.as_bytes().chunks(10_000) {
            sink.send(part).await?;
        }
        say("copy in", sink.finish().await?);
        let out = client.copy_out("COPY (SELECT * FROM c ORDER BY n) TO STDOUT").await?;
        let mut out = pin!(out);
        let mut digest = Sha256::new();
        while let Some(part) = out.next().await {
            digest.update(&part?);
        }
        say("copy out", digest.finalize());
        Ok(())
    }

    async fn large(client: &Client) -> Outcome {
        let sql = "SELECT repeat(md5(n::text), 32) FROM generate_series(1, 50000) AS n";
        let none: [i32; 0] = [];
        let mut rows = pin!(client.query_raw(sql, none).await?);
        let mut digest = Sha256::new();
        while let Some(row) = rows.try_next().await? {
            digest.update(row.try_get::<_, &str>(0)?);
        }
        say("50 MB, row by row", digest.finalize());
        let blob: Vec<u8> = (0..=255_u8).cycle().take(16 << 20).collect();
        let row = client.query_one("SELECT $1::bytea", &[&blob]).await?;
        say("16 MiB both ways", row.try_get::<_, &[u8]>(0)? == blob);
        Ok(())
    }

    async fn cancels(client: &Client) -> Outcome {
        let token = client.cancel_token();
        let cancel = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            token.cancel_query(NoTls).await
        };
        let (slept, cancelled) = tokio::join!(client.query("SELECT pg_sleep(30)", &[]), cancel);
        cancelled?;
        say("cancel", slept.as_ref().err().and_then(told));
        Ok(())
    }

    async fn startup_and_end() -> Outcome {
        let mut config = config()?;
        config.application_name("clients").options("-c search_path=pg_catalog");
        let (client, _messages) = connect(&config).await?;
        for name in ["application_name", "search_path"] {
            let row = client.query_one("SELECT current_setting($1)", &[&name]).await?;
            say("startup", row.try_get::<_, String>(0)?);
        }
        let ended = client.query("SELECT pg_terminate_backend(pg_backend_pid())", &[]).await;
        say("ended by the server", ended.as_ref().err().and_then(told));
        tokio::time::sleep(Duration::from_millis(100)).await;
        say("closed", client.is_closed());
        Ok(())
    }

    /// The driver has no pool of its own. This is what one does: a new handle for each connection.
    async fn pool() -> Outcome {
        let mut seen = Outliving::default();
        let mut pooled: Option<Client> = None;
        let began = Instant::now();
        while began.elapsed() < outliving() {
            let client = match pooled.take().filter(|client| !client.is_closed()) {
                Some(client) => client,
                None => connect(config()?.password(token().await?)).await?.0,
            };
            match client.query_one("SELECT pg_backend_pid()", &[]).await {
                Ok(row) => {
                    seen.answered(row.try_get(0)?);
                    pooled = Some(client);
                }
                Err(error) => seen.cut(&error),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        seen.finish();
        Ok(())
    }
}

mod pooled {
    use std::sync::Arc;

    use futures_util::TryStreamExt as _;
    use sha2::{Digest as _, Sha256};
    use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions};
    use sqlx::{Connection as _, Executor as _, PgConnection, Row as _};

    use super::{Duration, Instant, Outcome, Outliving, note, outliving, say, token, variable};

    pub(super) async fn run() -> Outcome {
        note("version 0.9");
        let mut connection = PgConnection::connect_with(&options()?).await?;
        values(&mut connection).await?;
        transactions(&mut connection).await?;
        errors(&mut connection).await?;
        streams(&mut connection).await?;
        connection.close().await?;
        listen().await?;
        startup_and_end().await?;
        pool().await
    }

    fn options() -> Outcome<PgConnectOptions> {
        Ok(PgConnectOptions::new_without_pgpass()
            .socket(variable("PGHOST")?)
            .port(variable("PGPORT")?.parse()?)
            .username(&variable("PGUSER")?)
            .password(&variable("PGPASSWORD")?)
            .database(&variable("PGDATABASE")?))
    }

    fn told(error: &sqlx::Error) -> Option<(String, String, Option<String>)> {
        let said = error.as_database_error()?;
        let code = said.code().map(|code| code.into_owned()).unwrap_or_default();
        Some((code, said.message().to_owned(), said.constraint().map(str::to_owned)))
    }

    async fn values(connection: &mut PgConnection) -> Outcome {
        let bytes: Vec<u8> = (0..=255).collect();
        let row = sqlx::query(
            "SELECT $1::int8, $2::float8, $3::bool, $4::text, $5::bytea, $6::int4[], $7::text",
        )
        .bind(i64::MAX)
        .bind(0.1_f64)
        .bind(true)
        .bind("aé漢😀")
        .bind(bytes)
        .bind(vec![Some(1_i32), None, Some(3)])
        .bind(None::<String>)
        .fetch_one(&mut *connection)
        .await?;
        say("int8", row.try_get::<i64, _>(0)?);
        say("float8", row.try_get::<f64, _>(1)?);
        say("bool", row.try_get::<bool, _>(2)?);
        say("text", row.try_get::<String, _>(3)?);
        say("bytea", row.try_get::<Vec<u8>, _>(4)?);
        say("int4[]", row.try_get::<Vec<Option<i32>>, _>(5)?);
        say("null", row.try_get::<Option<String>, _>(6)?);
        for number in 0..8_i32 {
            let twice = sqlx::query_scalar::<_, i32>("SELECT $1 * 2").bind(number);
            say("prepared", twice.fetch_one(&mut *connection).await?);
        }
        Ok(())
    }

    async fn transactions(connection: &mut PgConnection) -> Outcome {
        connection.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)").await?;
        let mut outer = connection.begin().await?;
        outer.execute("INSERT INTO t VALUES (1, 'one')").await?;
        let mut inner = outer.begin().await?;
        let again = inner.execute("INSERT INTO t VALUES (1, 'again')").await;
        say("unique violation", again.as_ref().err().and_then(told));
        inner.rollback().await?;
        outer.commit().await?;
        let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM t");
        say("committed", count.fetch_one(&mut *connection).await?);
        Ok(())
    }

    async fn errors(connection: &mut PgConnection) -> Outcome {
        for sql in ["SELEC 1", "SELECT 1/0", "SELECT * FROM nothing", "SELECT 'x'::int"] {
            say(
                sql,
                sqlx::query(sql).fetch_all(&mut *connection).await.as_ref().err().and_then(told),
            );
        }
        connection.execute("SET statement_timeout = 50").await?;
        let late = connection.execute("SELECT pg_sleep(10)").await;
        say("statement_timeout", late.as_ref().err().and_then(told));
        connection.execute("RESET statement_timeout").await?;
        Ok(())
    }

    async fn streams(connection: &mut PgConnection) -> Outcome {
        connection.execute("CREATE TEMP TABLE c (n int, text text)").await?;
        let mut copy = connection.copy_in_raw("COPY c FROM STDIN").await?;
        for n in 0..1000 {
            copy.send(format!("{n}\trow {n}\n").into_bytes()).await?;
        }
        say("copy in", copy.finish().await?);
        let mut digest = Sha256::new();
        {
            let mut out =
                connection.copy_out_raw("COPY (SELECT * FROM c ORDER BY n) TO STDOUT").await?;
            while let Some(part) = out.try_next().await? {
                digest.update(&part);
            }
        }
        say("copy out", digest.finalize());
        let mut digest = Sha256::new();
        {
            let sql = "SELECT repeat(md5(n::text), 32) FROM generate_series(1, 50000) AS n";
            let mut rows = sqlx::query(sql).fetch(&mut *connection);
            while let Some(row) = rows.try_next().await? {
                digest.update(row.try_get::<&str, _>(0)?);
            }
        }
        say("50 MB, row by row", digest.finalize());
        let blob: Vec<u8> = (0..=255_u8).cycle().take(16 << 20).collect();
        let echo = sqlx::query_scalar::<_, Vec<u8>>("SELECT $1::bytea").bind(&blob);
        say("16 MiB both ways", echo.fetch_one(&mut *connection).await? == blob);
        Ok(())
    }

    async fn listen() -> Outcome {
        let pool = PgPool::connect_with(options()?).await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.listen("news").await?;
        pool.execute("SELECT pg_notify('news', repeat('n', 7000))").await?;
        let news = listener.recv().await?;
        say("notification", (news.channel(), news.payload().len()));
        Ok(())
    }

    async fn startup_and_end() -> Outcome {
        let options =
            options()?.application_name("clients").options([("search_path", "pg_catalog")]);
        let mut connection = PgConnection::connect_with(&options).await?;
        for name in ["application_name", "search_path"] {
            let shown = sqlx::query_scalar::<_, String>("SELECT current_setting($1)").bind(name);
            say("startup", shown.fetch_one(&mut connection).await?);
        }
        let ended = connection.execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
        say("ended by the server", ended.as_ref().err().and_then(told));
        Ok(())
    }

    /// sqlx has no hook for the password, but new options can be set at any time: connections that
    /// are opened from then on use them.
    #[allow(clippy::disallowed_methods, reason = "the rule is the broker's; this is a client")]
    async fn pool() -> Outcome {
        let fresh = async || Outcome::Ok(options()?.password(&token().await?));
        let pool =
            Arc::new(PgPoolOptions::new().max_connections(1).connect_with(fresh().await?).await?);
        let refreshed = Arc::clone(&pool);
        let refresh = async move {
            loop {
                tokio::time::sleep(Duration::from_millis(500)).await;
                match fresh().await {
                    Ok(options) => refreshed.set_connect_options(options),
                    Err(error) => note(&format!("no handle: {error}")),
                }
            }
        };
        let asking = async {
            let mut seen = Outliving::default();
            let began = Instant::now();
            while began.elapsed() < outliving() {
                let asked = sqlx::query_scalar::<_, i32>("SELECT pg_backend_pid()");
                match asked.fetch_one(&*pool).await {
                    Ok(backend) => seen.answered(backend),
                    Err(error) => seen.cut(&error),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            seen.finish();
        };
        tokio::select! { () = asking => {}, () = refresh => {} }
        Ok(())
    }
}

//! Our login beside that of tokio-postgres, against the same server of a script.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a script differs from an honest one in one place"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::{digest, hmac, pbkdf2};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::{LoginRequest, log_in};
use crate::arena::{Arena, BackendChoice};

use crate::connection::tests::{connection, unix};
use crate::credential::{ChannelBinding, Credential, LoginRules, Method};
use crate::door::wire::Writer;
use crate::upstream::Route;

const PASSWORD: &str = "pencil";

/// What the server does otherwise than an honest one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Script {
    Honest,
    NoticesBetween,
    OtherNonce,
    WrongSignature,
    NoSignature,
    ScramError,
    FewIterations,
    ManyIterations,
    OtherMechanisms,
    LetsAnybodyIn,
    AsksPassword,
    AsksMd5,
    AsksKerberos,
    Error,
    ReadyTooEarly,
    ShortKey,
    RowInBetween,
    TalksOn,
    Closes,
}

/// Whether (we, tokio-postgres) are in afterwards. Where they differ, we are stricter on purpose: a
/// server must prove itself, by no fewer iterations than are safe, and say nothing out of place. A
/// notice at any time is the server's right (55.2.8), and only we allow for it.
const EXPECTED: [(Script, bool, bool); 19] = [
    (Script::Honest, true, true),
    (Script::NoticesBetween, true, false),
    (Script::OtherNonce, false, false),
    (Script::WrongSignature, false, false),
    (Script::NoSignature, false, false),
    (Script::ScramError, false, false),
    (Script::FewIterations, false, true),
    (Script::ManyIterations, false, false),
    (Script::OtherMechanisms, false, false),
    (Script::LetsAnybodyIn, false, true),
    (Script::AsksPassword, false, true),
    (Script::AsksMd5, false, true),
    (Script::AsksKerberos, false, false),
    (Script::Error, false, false),
    (Script::ReadyTooEarly, false, false),
    (Script::ShortKey, false, false),
    (Script::RowInBetween, false, false),
    (Script::TalksOn, false, true),
    (Script::Closes, false, false),
];

fn auth(kind: u32, rest: &[u8]) -> Vec<u8> {
    Writer::tagged(b'R').u32(kind).bytes(rest).finish()
}

fn let_in() -> Vec<u8> {
    [
        auth(0, b""),
        Writer::tagged(b'S').c_str("server_version").c_str("15.1").finish(),
        Writer::tagged(b'K').u32(7).bytes(&[1, 2, 3, 4]).finish(),
        Writer::tagged(b'Z').bytes(b"I").finish(),
    ]
    .concat()
}

async fn message(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut header = [0; 5];
    stream.read_exact(&mut header).await.ok()?;
    let [_tag, length @ ..] = header;
    let mut body = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap() - 4];
    stream.read_exact(&mut body).await.ok()?;
    Some(body)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One connection, to its end.
async fn serve(mut stream: UnixStream, script: Script) -> Option<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await.ok()?;
    let mut startup = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap() - 4];
    stream.read_exact(&mut startup).await.ok()?;
    let error = Writer::tagged(b'E')
        .bytes(b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed\0\0")
        .finish();
    let notice = Writer::tagged(b'N').bytes(b"SNOTICE\0VNOTICE\0C00000\0Mhello\0\0").finish();
    let asked = match script {
        Script::LetsAnybodyIn => return answer(&mut stream, &let_in()).await,
        Script::Error => return answer(&mut stream, &error).await,
        Script::Closes => return None,
        Script::ReadyTooEarly => {
            return answer(&mut stream, &Writer::tagged(b'Z').bytes(b"I").finish()).await;
        }
        Script::AsksPassword => auth(3, b""),
        Script::AsksMd5 => auth(5, b"salt"),
        Script::AsksKerberos => auth(7, b""),
        Script::OtherMechanisms => auth(10, b"SCRAM-SHA-512\0\0"),
        Script::NoticesBetween => [notice.clone(), auth(10, b"SCRAM-SHA-256\0\0")].concat(),
        Script::Honest
        | Script::OtherNonce
        | Script::WrongSignature
        | Script::NoSignature
        | Script::ScramError
        | Script::FewIterations
        | Script::ManyIterations
        | Script::ShortKey
        | Script::RowInBetween
        | Script::TalksOn => auth(10, b"SCRAM-SHA-256\0\0"),
    };
    stream.write_all(&asked).await.ok()?;
    let first = message(&mut stream).await?;
    if matches!(script, Script::AsksPassword | Script::AsksMd5) {
        return answer(&mut stream, &let_in()).await;
    }
    let first = text(&first);
    let (_header, nonce) = first.split_once("n=,r=")?;
    let bare = format!("n=,r={nonce}");
    let nonce = if script == Script::OtherNonce { "other" } else { nonce };
    let iterations: u32 = match script {
        Script::FewIterations => 4095,
        Script::ManyIterations => 1_000_000_000,
        _ => 4096,
    };
    let server_first = format!("r={nonce}more,s={},i={iterations}", BASE64.encode("salt"));
    stream.write_all(&auth(11, server_first.as_bytes())).await.ok()?;
    let last = text(&message(&mut stream).await?);
    if script == Script::NoSignature {
        return answer(&mut stream, &let_in()).await;
    }

    let mut salted = [0; digest::SHA256_OUTPUT_LEN];
    let rounds = std::num::NonZeroU32::new(iterations)?;
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, b"salt", PASSWORD.as_bytes(), &mut salted);
    let sign = |key: &[u8], data: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data);
    let without_proof = last.split(",p=").next()?;
    let message = format!("{bare},{server_first},{without_proof}");
    let mut signature =
        sign(sign(&salted, b"Server Key").as_ref(), message.as_bytes()).as_ref().to_vec();
    if script == Script::WrongSignature {
        signature[0] ^= 1;
    }
    let verifier = match script {
        Script::ScramError => "e=invalid-proof".to_owned(),
        _ => format!("v={}", BASE64.encode(signature)),
    };
    let mut rest = auth(12, verifier.as_bytes());
    match script {
        Script::ShortKey => {
            rest.extend(auth(0, b""));
            rest.extend(Writer::tagged(b'K').bytes(&[0, 0]).finish());
            rest.extend(Writer::tagged(b'Z').bytes(b"I").finish());
        }
        Script::RowInBetween => {
            rest.extend(auth(0, b""));
            rest.extend(Writer::tagged(b'D').bytes(&[0, 0]).finish());
            rest.extend(Writer::tagged(b'Z').bytes(b"I").finish());
        }
        Script::TalksOn => rest.extend([let_in(), notice].concat()),
        _ => rest.extend(let_in()),
    }
    answer(&mut stream, &rest).await
}

/// Sends it, and waits for the client to go.
async fn answer(stream: &mut UnixStream, bytes: &[u8]) -> Option<()> {
    stream.write_all(bytes).await.ok()?;
    while stream.read(&mut [0; 256]).await.ok()? > 0 {}
    Some(())
}

async fn ours(directory: &Path, rules: LoginRules) -> bool {
    let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
    let mut slot = arena.allocate(PASSWORD.len()).unwrap();
    slot.fill(|place| place.copy_from_slice(PASSWORD.as_bytes()));
    let credential = Arc::new(Credential::new("app".into(), slot));
    let mut connection = connection("main_db");
    connection.hosts = unix(directory);
    connection.login = rules;
    let link = Route::to(&connection).dial().await.unwrap();
    let attempt = credential.breaker().enter_regardless();
    let request = LoginRequest {
        connection: &connection,
        credential: &credential,
        attempt: &attempt,
        database: "mydb",
        parameters: &[],
    };
    log_in(link, request).await.is_ok()
}

async fn theirs(socket: &Path) -> bool {
    let stream = UnixStream::connect(socket).await.unwrap();
    let mut config = tokio_postgres::Config::new();
    config.user("app").password(PASSWORD).dbname("mydb");
    let login = config.connect_raw(stream, tokio_postgres::NoTls);
    let answer = tokio::time::timeout(Duration::from_secs(5), login).await;
    answer.is_ok_and(|login| login.is_ok())
}

#[tokio::test]
async fn both_take_and_refuse_the_same_but_where_we_are_stricter() {
    for (script, we, they) in EXPECTED {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join(".s.PGSQL.5432");
        #[expect(clippy::disallowed_methods, reason = "a server of the test's own")]
        let listener = UnixListener::bind(&socket).unwrap();
        let mut serving = tokio::task::JoinSet::new();
        serving.spawn(async move {
            for _client in 0..2 {
                let (stream, _) = listener.accept().await.unwrap();
                let _ended = serve(stream, script).await;
            }
        });
        assert_eq!(ours(directory.path(), LoginRules::default()).await, we, "we, {script:?}");
        assert_eq!(theirs(&socket).await, they, "they, {script:?}");
    }
}

#[tokio::test]
async fn md5_is_answered_where_it_is_named() {
    let directory = tempfile::tempdir().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a server of the test's own")]
    let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap();
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn(async move {
        for script in [Script::AsksMd5, Script::AsksPassword] {
            let (stream, _) = listener.accept().await.unwrap();
            let _ended = serve(stream, script).await;
        }
    });
    let methods = vec![Method::Md5, Method::Password];
    let rules = LoginRules::new(methods, ChannelBinding::Prefer).unwrap();
    assert!(ours(directory.path(), rules.clone()).await);
    assert!(!ours(directory.path(), rules).await, "not to a server that has proved nothing");
}

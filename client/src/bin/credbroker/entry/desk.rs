//! Where the page is asked for, and where one secret is taken.
//!
//! Invariants: [`Stage::Open`] owns the only way to hand a secret on, and whoever takes a secret
//! takes that with it, under one lock: of two forms that race one is taken. A try is counted
//! before it is looked at. What a browser sent is wiped before it is answered.

use std::mem;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use credbroker_client::{Secret, SecretError};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, ORIGIN};
use hyper::{HeaderMap, Method, Request, StatusCode};
use tokio::sync::{oneshot, watch};
use zeroize::Zeroizing;

use super::form::{self, Form};
use super::page::{About, Page, Press};
use super::ticket::{Code, Token};
use crate::failure::Failure;

/// The most that a form may have, in bytes, encoded.
pub(super) const MAX_BODY: usize = 20 << 10;
/// Wrong codes that end the entry.
pub(super) const TRIES: u8 = 5;
/// Requests for pages that there are not, or under a wrong name, that end the entry.
pub(super) const STRAYS: u8 = 16;

const FORM: &str = "application/x-www-form-urlencoded";
const RESULT: &str = "done";

/// What a person typed.
pub(super) struct Deposit {
    pub(super) username: Option<String>,
    pub(super) secret: Secret,
}

/// How the desk closes by itself.
pub(super) enum Closed {
    With(Deposit),
    TooManyCodes,
    TooManyStrays,
}

/// What became of a deposit, in words for the page.
#[derive(Clone)]
pub(super) enum Outcome {
    Stored(String),
    Failed(String),
}

pub(super) struct Desk {
    about: About,
    press: Press,
    path: Token,
    token: Token,
    code: Code,
    hosts: [String; 2],
    stage: Mutex<Stage>,
    outcome: watch::Sender<Option<Outcome>>,
    told: watch::Sender<bool>,
}

enum Stage {
    Open { close: oneshot::Sender<Closed>, tries: u8, strays: u8 },
    Closed,
}

impl Desk {
    /// An open desk at `address`, and what it will close with.
    pub(super) fn open(
        about: About,
        address: SocketAddr,
    ) -> Result<(Self, oneshot::Receiver<Closed>), Failure> {
        let (close, closed) = oneshot::channel();
        let desk = Self {
            about,
            press: Press::new(),
            path: Token::random()?,
            token: Token::random()?,
            code: Code::random()?,
            hosts: [address.to_string(), format!("localhost:{}", address.port())],
            stage: Mutex::new(Stage::Open { close, tries: TRIES, strays: STRAYS }),
            outcome: watch::channel(None).0,
            told: watch::channel(false).0,
        };
        Ok((desk, closed))
    }

    /// Where the page is. No secret: it opens the form, and nothing without the code.
    pub(super) fn url(&self) -> String {
        let [host, _] = &self.hosts;
        format!("http://{host}/{}", self.path.as_str())
    }

    pub(super) fn code(&self) -> String {
        self.code.to_text()
    }

    pub(super) fn about(&self) -> &About {
        &self.about
    }

    /// Takes nothing any more.
    pub(super) fn close(&self) {
        *self.stage() = Stage::Closed;
    }

    /// For those who wait for it.
    pub(super) fn settle(&self, outcome: Outcome) {
        self.outcome.send_replace(Some(outcome));
    }

    /// Waits until a browser has the outcome.
    pub(super) fn told(&self) -> impl Future<Output = ()> + use<> {
        let mut told = self.told.subscribe();
        async move {
            // The sender lives as long as the desk.
            let _told = told.wait_for(|told| *told).await;
        }
    }

    /// The outcome was written to a browser.
    pub(super) fn set_told(&self) {
        self.told.send_replace(true);
    }

    /// Answers one request; `told` is set when the answer is the outcome.
    pub(super) async fn answer(&self, request: Request<Incoming>, told: &AtomicBool) -> Page {
        if !self.is_addressed(&request) {
            return self.stray();
        }
        let path = request.uri().path().strip_prefix('/').unwrap_or_default();
        let (first, rest) = path.split_once('/').unwrap_or((path, ""));
        if !self.path.is(first.as_bytes()) {
            // Browsers ask for it by themselves.
            if path == "favicon.ico" {
                return self.not_found();
            }
            return self.stray();
        }
        match (rest, request.method()) {
            ("", &Method::GET | &Method::HEAD) => self.show(),
            ("", &Method::POST) => self.take(request).await,
            (RESULT, &Method::GET) => self.tell(told).await,
            ("" | RESULT, _) => self.press.wrong_method(),
            _ => self.stray(),
        }
    }

    /// Whether it was sent to us by name: another name that leads here is another site, which
    /// would be of the same origin as the page (DNS rebinding).
    fn is_addressed(&self, request: &Request<Incoming>) -> bool {
        let host = request.headers().get(HOST).map(|host| host.as_bytes());
        request.uri().authority().is_none()
            && host.is_some_and(|host| self.hosts.iter().any(|own| own.as_bytes() == host))
    }

    fn show(&self) -> Page {
        if self.is_open() {
            self.press.form(StatusCode::OK, &self.about, &self.token, None)
        } else {
            self.gone()
        }
    }

    async fn take(&self, request: Request<Incoming>) -> Page {
        if !self.is_own_form(request.headers()) {
            return self.press.notice(
                StatusCode::FORBIDDEN,
                "Refused",
                "This did not come from the page itself. Nothing was stored.",
            );
        }
        let Some(mut body) = read(request.into_body()).await else {
            return self.press.notice(
                StatusCode::PAYLOAD_TOO_LARGE,
                "Too long",
                "A form takes 20 KiB. `credbroker put NAME --secret-file FILE` takes more. \
                 Nothing was stored.",
            );
        };
        match form::parse(&mut body) {
            Some(form) if self.token.is(form.token) => self.redeem(&form),
            Some(_) | None => self.press.notice(
                StatusCode::BAD_REQUEST,
                "Refused",
                "This is not the form of the page. Nothing was stored.",
            ),
        }
    }

    /// Browsers say from where a form was sent, and a page cannot make them lie.
    fn is_own_form(&self, headers: &HeaderMap) -> bool {
        let value = |name: HeaderName| headers.get(name).map(|value| value.as_bytes());
        let origin = value(HOST).map(|host| [b"http://", host].concat());
        let site = value(HeaderName::from_static("sec-fetch-site"));
        origin.is_some()
            && value(ORIGIN) == origin.as_deref()
            && site.is_none_or(|site| site == b"same-origin")
            && value(CONTENT_TYPE) == Some(FORM.as_bytes())
    }

    fn redeem(&self, form: &Form<'_>) -> Page {
        let deposit = deposit(form);
        let mut stage = self.stage();
        let Stage::Open { tries, .. } = &mut *stage else { return self.gone() };
        *tries = tries.saturating_sub(1);
        let left = *tries;
        if !self.code.is(form.code) {
            if left == 0 {
                close(&mut stage, Closed::TooManyCodes);
                return self.press.notice(
                    StatusCode::FORBIDDEN,
                    "Closed",
                    "The code was wrong too often. Nothing was stored: start the command again.",
                );
            }
            let problem = format!("That is not the code. {left} more tries.");
            return self.again(StatusCode::FORBIDDEN, &problem);
        }
        *tries = TRIES;
        match deposit {
            Ok(deposit) => {
                close(&mut stage, Closed::With(deposit));
                self.press.see_other(&format!("/{}/{RESULT}", self.path.as_str()))
            }
            Err(problem) => self.again(StatusCode::UNPROCESSABLE_ENTITY, problem),
        }
    }

    fn again(&self, status: StatusCode, problem: &str) -> Page {
        self.press.form(status, &self.about, &self.token, Some(problem))
    }

    async fn tell(&self, told: &AtomicBool) -> Page {
        if self.is_open() {
            return self.not_found();
        }
        let mut outcome = self.outcome.subscribe();
        let outcome = match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_closed) => None,
        };
        let Some(outcome) = outcome else { return self.gone() };
        told.store(true, Ordering::Relaxed);
        match outcome {
            Outcome::Stored(text) => self.press.notice(StatusCode::OK, "Stored", &text),
            Outcome::Failed(text) => {
                self.press.notice(StatusCode::BAD_GATEWAY, "Not stored", &text)
            }
        }
    }

    fn stray(&self) -> Page {
        let mut stage = self.stage();
        if let Stage::Open { strays, .. } = &mut *stage {
            *strays = strays.saturating_sub(1);
            if *strays == 0 {
                close(&mut stage, Closed::TooManyStrays);
            }
        }
        self.not_found()
    }

    fn not_found(&self) -> Page {
        self.press.notice(StatusCode::NOT_FOUND, "Not here", "There is no such page.")
    }

    fn gone(&self) -> Page {
        let text = "This page has been used, or its time is over. Start the command again.";
        self.press.notice(StatusCode::GONE, "Closed", text)
    }

    fn is_open(&self) -> bool {
        matches!(*self.stage(), Stage::Open { .. })
    }

    /// The clock on the wall counts too: the other one stands still while a laptop sleeps.
    fn stage(&self) -> MutexGuard<'_, Stage> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if SystemTime::now() > self.about.expires {
            // Dropping the sender is told as the end of time.
            *stage = Stage::Closed;
        }
        stage
    }
}

/// Closes an open desk.
fn close(stage: &mut Stage, with: Closed) {
    if let Stage::Open { close, .. } = mem::replace(stage, Stage::Closed) {
        // Who waited for it has given up, and wipes what is sent by dropping it.
        let _given_up = close.send(with);
    }
}

fn deposit(form: &Form<'_>) -> Result<Deposit, &'static str> {
    let username = match form.username {
        [] => None,
        name => {
            Some(str::from_utf8(name).map_err(|_not| "The user name is not UTF-8.")?.to_owned())
        }
    };
    if form.secret != form.again {
        return Err("The two passwords are not the same.");
    }
    match Secret::from_bytes(form.secret.to_vec()) {
        Ok(secret) => Ok(Deposit { username, secret }),
        Err(SecretError::Empty) => Err("No password was typed."),
        Err(SecretError::TooLong) => Err("The password is longer than 16384 bytes."),
        Err(_) => Err("The system gives no memory for it. Try again."),
    }
}

/// The whole body, in one buffer that is wiped. `None`: too long, or it did not come.
async fn read(body: Incoming) -> Option<Zeroizing<Vec<u8>>> {
    // What is announced is not waited for.
    if body.size_hint().lower() > MAX_BODY as u64 {
        return None;
    }
    let mut whole = Zeroizing::new(Vec::with_capacity(MAX_BODY));
    let mut body = Limited::new(body, MAX_BODY);
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.ok()?.into_data() {
            whole.extend_from_slice(&data);
        }
    }
    Some(whole)
}

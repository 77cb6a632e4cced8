//! The pages: HTML without a script, and headers that allow none.

use std::fmt::Write as _;
use std::time::SystemTime;

use data_encoding::BASE64;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::{Response, StatusCode};
use ring::digest::{SHA256, digest};

use super::ticket::Token;

/// An answer to a browser.
pub(super) type Page = Response<Full<Bytes>>;

const STYLE: &str = include_str!("page.css");

/// What the page tells of the entry. Nothing of it is secret.
pub(super) struct About {
    pub(super) connection: String,
    /// Where it leads, masked.
    pub(super) target: String,
    /// The database role, where the command line names it.
    pub(super) username: Option<String>,
    /// Who started the command, and who may open the page.
    pub(super) started_by: u32,
    pub(super) opened_by: u32,
    pub(super) expires: SystemTime,
}

/// Makes the pages of one entry.
pub(super) struct Press {
    policy: String,
}

impl Press {
    pub(super) fn new() -> Self {
        let style = BASE64.encode(digest(&SHA256, STYLE.as_bytes()).as_ref());
        Self {
            policy: format!(
                "default-src 'none'; style-src 'sha256-{style}'; form-action 'self'; \
                 frame-ancestors 'none'; base-uri 'none'"
            ),
        }
    }

    /// The form, under what is wrong with what was sent.
    pub(super) fn form(
        &self,
        status: StatusCode,
        about: &About,
        token: &Token,
        problem: Option<&str>,
    ) -> Page {
        let mut body = String::new();
        let connection = escaped(&about.connection);
        if let Some(problem) = problem {
            push(
                &mut body,
                format_args!("<p class=\"bad\" role=\"alert\">{}</p>", escaped(problem)),
            );
        }
        body.push_str("<dl>");
        let mut fact = |name: &str, value: &str| {
            push(&mut body, format_args!("<dt>{name}</dt><dd>{}</dd>", escaped(value)));
        };
        fact("Connection", &about.connection);
        fact("Database", &about.target);
        if let Some(username) = &about.username {
            fact("User name", username);
        }
        fact("Asked for by", &format!("uid {}, in a terminal of this host", about.started_by));
        fact("Opened by", &format!("uid {}, and nobody else", about.opened_by));
        fact("Good until", &clock(about.expires));
        body.push_str("</dl>");
        push(
            &mut body,
            format_args!(
                "<form method=\"post\" autocomplete=\"off\">\
                 <input type=\"hidden\" name=\"token\" value=\"{}\">\
                 <label for=\"code\">Code that the terminal shows</label>\
                 <input id=\"code\" name=\"code\" required autofocus autocomplete=\"off\" \
                 autocapitalize=\"characters\" spellcheck=\"false\" maxlength=\"16\" \
                 aria-describedby=\"code-help\">\
                 <p class=\"help\" id=\"code-help\">No code there? Then somebody else sent you \
                 here: close this page.</p>",
                token.as_str()
            ),
        );
        if about.username.is_none() {
            body.push_str(
                "<label for=\"username\">User name</label>\
                 <input id=\"username\" name=\"username\" autocomplete=\"off\" \
                 autocapitalize=\"none\" spellcheck=\"false\" maxlength=\"63\" \
                 aria-describedby=\"username-help\">\
                 <p class=\"help\" id=\"username-help\">Leave it empty where the broker's \
                 configuration has it.</p>",
            );
        }
        push(
            &mut body,
            format_args!(
                "<label for=\"secret\">Password for {connection}</label>\
                 <input id=\"secret\" name=\"secret\" type=\"password\" required \
                 autocomplete=\"new-password\" spellcheck=\"false\">\
                 <label for=\"again\">The same again</label>\
                 <input id=\"again\" name=\"again\" type=\"password\" required \
                 autocomplete=\"new-password\" spellcheck=\"false\">\
                 <button type=\"submit\">Store it</button></form>\
                 <p class=\"help\">It goes from here into the locked memory of the broker, and \
                 nowhere else. The page works once.</p>"
            ),
        );
        self.page(status, &format!("Password for {connection}"), &body)
    }

    /// One sentence, or a few.
    pub(super) fn notice(&self, status: StatusCode, title: &str, text: &str) -> Page {
        self.page(status, &escaped(title), &format!("<p>{}</p>", escaped(text)))
    }

    /// For a method that is not taken.
    pub(super) fn wrong_method(&self) -> Page {
        let status = StatusCode::METHOD_NOT_ALLOWED;
        let mut page = self.notice(status, "Not so", "This page is opened, and its form is sent.");
        page.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
        page
    }

    /// Sends the browser to `path` by GET, so that reloading sends no secret again (RFC 9110
    /// §15.4.4).
    pub(super) fn see_other(&self, path: &str) -> Page {
        let mut page = self.notice(StatusCode::SEE_OTHER, "Sent", "The broker is being asked.");
        if let Ok(path) = HeaderValue::from_str(path) {
            page.headers_mut().insert(LOCATION, path);
        }
        page
    }

    /// `title` and `body` are HTML already.
    fn page(&self, status: StatusCode, title: &str, body: &str) -> Page {
        let html = format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\">\
             <title>{title} · credbroker</title><style>{STYLE}</style></head>\
             <body><main><p class=\"brand\">credbroker</p><h1>{title}</h1>{body}</main></body>\
             </html>"
        );
        let mut page = Response::new(Full::new(html.into()));
        *page.status_mut() = status;
        let headers = page.headers_mut();
        for (name, value) in [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            (CACHE_CONTROL, "no-store"),
            // Under no-referrer a browser would send `Origin: null` with the form, and there
            // would be nothing to check (Fetch Standard, "append a request Origin header").
            (REFERRER_POLICY, "same-origin"),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "DENY"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
            (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if let Ok(policy) = HeaderValue::from_str(&self.policy) {
            headers.insert(CONTENT_SECURITY_POLICY, policy);
        }
        page
    }
}

fn push(to: &mut String, text: std::fmt::Arguments<'_>) {
    // A string takes everything.
    let _never = to.write_fmt(text);
}

/// To the second, in UTC.
fn clock(at: SystemTime) -> String {
    let at = humantime::format_rfc3339_seconds(at).to_string();
    at.replace('T', " ").replace('Z', " UTC")
}

/// As text or as the value of an attribute in double quotes.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt as _;

    use super::*;

    fn html(page: Page) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let body = runtime.block_on(page.into_body().collect()).unwrap();
        String::from_utf8(body.to_bytes().to_vec()).unwrap()
    }

    fn about(connection: &str) -> About {
        About {
            connection: connection.into(),
            target: "postgresql://***:***@db/x".into(),
            username: None,
            started_by: 0,
            opened_by: 1000,
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(60),
        }
    }

    #[test]
    fn what_others_named_is_text_and_no_markup() {
        let press = Press::new();
        let token = Token::random().unwrap();
        let about = about("<script>\"'&");
        let html = html(press.form(StatusCode::OK, &about, &token, Some("<b>")));
        assert!(!html.contains("<script") && !html.contains("<b>"), "{html}");
        assert!(html.contains("&lt;script&gt;&quot;&#39;&amp;"), "{html}");
    }

    #[test]
    fn every_field_has_a_label_and_none_is_remembered() {
        let token = Token::random().unwrap();
        let html = html(Press::new().form(StatusCode::OK, &about("main_db"), &token, None));
        for field in ["code", "username", "secret", "again"] {
            assert!(html.contains(&format!("<label for=\"{field}\">")), "{field}");
            assert!(html.contains(&format!("<input id=\"{field}\" name=\"{field}\"")), "{field}");
        }
        assert_eq!(html.matches("autocomplete=\"new-password\"").count(), 2);
        assert_eq!(html.matches("<input").count(), 5);
        assert!(!html.contains("http://") && !html.contains(" style=") && !html.contains("on="));
    }

    #[test]
    fn the_policy_allows_our_style_and_nothing_else() {
        let page = Press::new().notice(StatusCode::OK, "a", "b");
        let policy = page.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned();
        let html = html(page);
        let (_, style) = html.split_once("<style>").unwrap();
        let (style, _) = style.split_once("</style>").unwrap();
        let hash = BASE64.encode(digest(&SHA256, style.as_bytes()).as_ref());
        assert!(policy.contains(&format!("style-src 'sha256-{hash}'")), "{policy}");
        assert!(
            policy.starts_with("default-src 'none';") && !policy.contains("unsafe"),
            "{policy}"
        );
    }
}

//! What any gRPC client finds on the socket.

use credbroker_e2e::broker::Broker;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;
use credbroker_proto::v1::{IssueHandleRequest, RevokeHandleRequest};
use tonic::Code;

const SERVICE: &str = "credbroker.v1.HandleService";

#[test]
fn health_and_reflection_answer() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    assert_eq!(service.serving(""), Ok(true));
    assert_eq!(service.serving(SERVICE), Ok(true));
    let services = service.reflected_services().expect("reflection answers");
    assert!(services.iter().any(|name| name == SERVICE), "{services:?}");
    assert!(services.iter().any(|name| name == "grpc.health.v1.Health"), "{services:?}");
}

#[test]
fn whoami_tells_what_the_kernel_says() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let whoami = broker.handles(&client).whoami().expect("an answer");
    assert_eq!((whoami.uid, whoami.gid), (client.uid(), client.gid()));
    assert_eq!(whoami.pid, Some(std::process::id()));
    assert_eq!(whoami.grants, ["client"]);
}

#[test]
fn connections_are_listed_masked() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let listed = broker.handles(&Identity::client()).connections().expect("an answer");
    let [connection] = listed.as_slice() else { panic!("one connection: {listed:?}") };
    assert_eq!(connection.name, "main_db");
    assert_eq!(connection.r#type, "postgresql");
    assert!(connection.has_credential);
    let secret = database.secret();
    let (user, password) = secret.split_once(':').expect("user:password");
    assert!(!connection.target.contains(password), "{}", connection.target);
    assert!(!connection.target.contains(&format!("{user}:")), "{}", connection.target);
}

#[test]
fn wrong_fields_are_named() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let wrong = [
        IssueHandleRequest { purpose: "<script>".into(), ..request() },
        IssueHandleRequest { subject: "x".repeat(129), ..request() },
        IssueHandleRequest {
            ttl: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            ..request()
        },
        IssueHandleRequest { bind: 99, ..request() },
    ];
    for request in wrong {
        let refused = service.issue_with(request.clone()).expect_err("a wrong field");
        assert_eq!(refused.code, Code::InvalidArgument, "{request:?}");
        assert_eq!(refused.reason, "INVALID_REQUEST", "{request:?}");
    }
    let nothing = service
        .call(async |mut client| client.revoke_handle(RevokeHandleRequest { handle: None }).await);
    assert_eq!(nothing.expect_err("nothing to revoke").code, Code::InvalidArgument);
}

fn request() -> IssueHandleRequest {
    IssueHandleRequest { connection: "main_db".into(), ..Default::default() }
}

#[test]
fn the_command_line_issues_lists_and_revokes() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let run = |arguments: &[&str]| {
        let mut cli = broker.cli(&Identity::client());
        let done = output(cli.args(arguments), PATIENCE);
        assert!(done.status.success(), "{arguments:?}: {}", transcript(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let issued = run(&["handle", "issue", "main_db"]);
    assert!(issued.contains("cbh_"), "{issued}");
    let listed = run(&["handle", "list"]);
    let id = listed.split_whitespace().find(|word| word.starts_with("hdl_"));
    let id = id.expect("an identifier").to_owned();
    assert!(!listed.contains("cbh_"), "{listed}");
    run(&["handle", "revoke", &id]);
    assert!(!run(&["handle", "list"]).contains(&id));
    assert!(run(&["whoami"]).contains(&Identity::client().uid().to_string()));
    assert!(run(&["list"]).contains("main_db"));
}

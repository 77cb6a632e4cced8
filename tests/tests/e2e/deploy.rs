//! What stands in `deploy/` works: the examples are read by the programs that will read them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use credbroker_e2e::binaries::{self, workspace};
use credbroker_e2e::broker::Setup;
use credbroker_e2e::identity::{Identity, SOCKET_GROUP};
use credbroker_e2e::postgres::TlsIdentity;
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;
use yaml_rust2::{Yaml, YamlLoader};

fn deploy(name: &str) -> PathBuf {
    workspace().join("deploy").join(name)
}

/// Checks a configuration as it stands, but for names and files that this machine lacks.
fn check(text: &str) -> Output {
    let setup = Setup::new();
    let ca = setup.broker_file("etc/ca.pem", &TlsIdentity::generate().ca);
    let text = text
        .replace("\"credbroker\"", &SOCKET_GROUP.to_string())
        .replace("/etc/credbroker/db-ca.pem", &ca.display().to_string());
    let _config = setup.broker_file("etc/broker.toml", &text);
    output(&mut setup.command("check-config"), PATIENCE)
}

#[test]
fn the_example_configurations_are_good() {
    for name in ["broker.toml", "broker.full.toml"] {
        let text = fs::read_to_string(deploy(name)).expect("an example");
        let done = check(&text);
        assert!(done.status.success(), "{name}: {}", transcript(&done));
    }
}

#[test]
fn the_units_are_good() {
    let analyze = Path::new("/usr/bin/systemd-analyze");
    assert!(analyze.exists(), "systemd-analyze is missing (Debian: apt-get install systemd)");
    // verify wants the program to exist, so the unit gets the path of the one just built.
    let units = tempfile::tempdir().expect("a directory");
    let names = [
        "credbrokerd.service",
        "credbrokerd.socket",
        "credbrokerd-packet.socket",
        "credbrokerd-postgres.socket",
    ];
    for name in names {
        let text = fs::read_to_string(deploy(name)).expect("a unit");
        let program = binaries::credbrokerd().display().to_string();
        let text = text.replace("/usr/bin/credbrokerd", &program);
        fs::write(units.path().join(name), text).expect("a unit");
    }
    let unit = |name: &str| units.path().join(name);
    let mut verify = Command::new(analyze);
    verify.args(["verify", "--man=no", "--recursive-errors=no"]).args(names.map(unit));
    let done = output(&mut verify, PATIENCE);
    let said = transcript(&done);
    assert!(done.status.success(), "{said}");
    assert!(!said.contains("credbrokerd"), "a warning about our units:\n{said}");
}

#[test]
fn the_units_name_the_sockets_as_the_broker_expects() {
    let text = |name: &str| fs::read_to_string(deploy(name)).expect("a unit");
    let broker = text("credbrokerd.socket");
    assert!(broker.contains("FileDescriptorName=broker\n"));
    assert!(broker.contains("ListenStream=/run/credbroker/broker.sock\n"));
    let packet = text("credbrokerd-packet.socket");
    assert!(packet.contains("FileDescriptorName=packet\n"));
    assert!(packet.contains("ListenSequentialPacket=/run/credbroker/packet.sock\n"));
    let door = text("credbrokerd-postgres.socket");
    assert!(door.contains("FileDescriptorName=postgres\n"));
    assert!(door.contains("ListenStream=/run/credbroker/postgres/.s.PGSQL.5432\n"));
}

#[test]
fn the_pod_keeps_the_workload_apart_from_the_secret() {
    let text = fs::read_to_string(deploy("pod.yaml")).expect("a manifest");
    let documents = YamlLoader::load_from_str(&text).expect("YAML");
    let of_kind = |kind: &str| {
        documents.iter().find(|document| document["kind"].as_str() == Some(kind)).expect("a kind")
    };
    let config = of_kind("ConfigMap")["data"]["broker.toml"].as_str().expect("a configuration");
    let done = check(config);
    assert!(done.status.success(), "{}", transcript(&done));

    let spec = &of_kind("Pod")["spec"];
    let broker = &spec["initContainers"][0];
    let worker = &spec["containers"][0];
    assert_eq!(broker["restartPolicy"].as_str(), Some("Always"), "a native sidecar");
    assert_eq!(spec["securityContext"]["runAsNonRoot"].as_bool(), Some(true));
    assert_eq!(spec["shareProcessNamespace"].as_bool(), Some(false));
    let uids: HashSet<_> = [broker, worker]
        .map(|container| container["securityContext"]["runAsUser"].as_i64().expect("a uid"))
        .into();
    assert_eq!(uids.len(), 2, "each container has a uid of its own");
    for container in [broker, worker] {
        let context = &container["securityContext"];
        assert_eq!(context["readOnlyRootFilesystem"].as_bool(), Some(true));
        assert_eq!(context["allowPrivilegeEscalation"].as_bool(), Some(false));
    }
    assert_eq!(broker["startupProbe"]["exec"]["command"][1].as_str(), Some("health"));

    // The grant and the group are those of the containers.
    let uid = worker["securityContext"]["runAsUser"].as_i64().expect("a uid");
    assert!(config.contains(&format!("uid = {uid}")), "{config}");
    let group = spec["securityContext"]["fsGroup"].as_i64().expect("a group");
    assert!(config.contains(&format!("socket_group = {group}")), "{config}");

    // What the workload sees: one directory, read-only, below a volume that only the broker has.
    let [Yaml::Hash(_)] = worker["volumeMounts"].as_vec().expect("mounts").as_slice() else {
        panic!("the workload has one mount: {:?}", worker["volumeMounts"]);
    };
    let mount = &worker["volumeMounts"][0];
    assert_eq!(mount["name"].as_str(), Some("runtime"));
    assert_eq!(mount["readOnly"].as_bool(), Some(true));
    let sub_path = mount["subPath"].as_str().expect("a subPath");
    let mounts = broker["volumeMounts"].as_vec().expect("mounts");
    let runtime = mounts.iter().find(|mount| mount["name"].as_str() == Some("runtime"));
    let volume = runtime.and_then(|mount| mount["mountPath"].as_str()).expect("a path");
    assert!(config.contains(&format!("runtime_dir = \"{volume}/{sub_path}\"")), "{config}");
}

#[test]
fn the_programs_say_what_they_are() {
    for program in [binaries::credbrokerd(), binaries::credbroker(), binaries::sql_worker()] {
        let mut version = Identity::client().command(&program);
        let done = output(version.arg("--version"), PATIENCE);
        assert!(done.status.success(), "{}: {}", program.display(), transcript(&done));
        assert!(transcript(&done).contains(env!("CARGO_PKG_VERSION")), "{}", transcript(&done));
    }
}

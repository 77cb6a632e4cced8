//! What handshakes with a client certificate leave outside the arena: nothing of the key.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use data_encoding::HEXLOWER;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::signal::unix::{SignalKind, signal};

use super::tests::{Authority, KEYS, client, key_file, server, shake};
use crate::arena::{Arena, BackendChoice};
use crate::connection::Check;
use crate::upstream::tls::client_config;
use crate::{isolated, sys};

/// One element of DER: its content, and what follows it.
fn element(der: &[u8]) -> (&[u8], &[u8]) {
    let (len, at) = match der[1] {
        short @ 0..=0x7f => (usize::from(short), 2),
        0x81 => (usize::from(der[2]), 3),
        0x82 => (usize::from(u16::from_be_bytes([der[2], der[3]])), 4),
        other => panic!("a length of {other:x}"),
    };
    (&der[at..at + len], &der[at + len..])
}

/// All elements of a sequence.
fn elements(der: &[u8]) -> Vec<&[u8]> {
    let (mut rest, mut all) = (element(der).0, Vec::new());
    while !rest.is_empty() {
        let (content, after) = element(rest);
        all.push(content);
        rest = after;
    }
    all
}

/// The numbers of a key that must not be seen.
fn secrets(pem: &str, kind: &str) -> Vec<(&'static str, Vec<u8>)> {
    let pkcs8 = PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap();
    let inner = elements(pkcs8.secret_der())[2].to_vec();
    if kind.starts_with("Rsa") {
        // RFC 8017, A.1.2.
        let names = ["d", "p", "q", "d mod p-1", "d mod q-1", "1/q mod p"];
        let numbers = elements(&inner);
        names.into_iter().zip(&numbers[3..]).map(|(name, number)| (name, number.to_vec())).collect()
    } else if kind == "Ed25519" {
        let seed = element(&inner).0.to_vec();
        // RFC 8032 §5.1.5: its hash has the scalar and the prefix.
        let hash = ring::digest::digest(&ring::digest::SHA512, &seed).as_ref().to_vec();
        let mut scalar = hash[..32].to_vec();
        scalar[0] &= 248;
        scalar[31] = (scalar[31] & 63) | 64;
        vec![("seed", seed), ("scalar", scalar), ("prefix", hash[32..].to_vec())]
    } else {
        let scalar = elements(&inner)[1].to_vec();
        let order = if kind == "EcdsaP256" { P256_ORDER } else { P384_ORDER };
        let mut montgomery = scalar.clone();
        for _bit in 0..8 * scalar.len() {
            double(&mut montgomery, &HEXLOWER.decode(order.as_bytes()).unwrap());
        }
        vec![("scalar", scalar), ("scalar, as ring holds it", montgomery)]
    }
}

/// SEC 2 §2.4.2 and §2.5.1.
const P256_ORDER: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
const P384_ORDER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffff\
                          c7634d81f4372ddf581a0db248b0a77aecec196accc52973";

/// Twice a number, modulo `order`; both big-endian and of the same length.
fn double(number: &mut [u8], order: &[u8]) {
    let carry = number[0] >> 7;
    for at in 0..number.len() {
        number[at] = number[at] << 1 | number.get(at + 1).map_or(0, |next| next >> 7);
    }
    if carry == 1 || &*number >= order {
        let mut borrow = 0;
        for at in (0..number.len()).rev() {
            let (less, first) = number[at].overflowing_sub(order[at]);
            let (less, second) = less.overflowing_sub(borrow);
            number[at] = less;
            borrow = u8::from(first || second);
        }
    }
}

/// Parts of each number in either order, and of the text: a block of the heap that was freed and
/// not wiped has other bytes at its beginning.
fn patterns(file: &str, pkcs8: &str, kind: &str) -> Vec<(&'static str, Vec<u8>)> {
    let pem = std::fs::read_to_string(key_file(pkcs8)).unwrap();
    let text = std::fs::read_to_string(key_file(file)).unwrap();
    // A line of the middle: the first and the last have the least of the secret.
    let (_, body) = text.rsplit_once("-----BEGIN").unwrap();
    let lines: Vec<&str> = body.lines().skip(1).filter(|line| !line.starts_with('-')).collect();
    let line = lines[lines.len() / 2];
    let mut all = vec![("text", line.as_bytes()[line.len() - 24..].to_vec())];
    for (name, number) in secrets(&pem, kind) {
        let mut turned_round = number.clone();
        turned_round.reverse();
        for number in [number, turned_round] {
            for at in [number.len() / 2 - 8, number.len() - 16 - number.len() % 8] {
                all.push((name, number[at..at + 16].to_vec()));
            }
        }
    }
    all
}

fn turned(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

/// Runs `work` far down the stack, where nothing that is called afterwards gets to.
#[inline(never)]
fn deep_down(work: impl FnOnce()) {
    let space = std::hint::black_box([0_u8; 64 * 1024]);
    work();
    std::hint::black_box(space);
}

/// For each kind of key, handshakes on a worker of tokio's, in its blocking pool, on another
/// thread and on the main one, and then a search of the process's own memory while all of these
/// threads live. What to search for is computed in another process. After the last handshake
/// comes a signal, for which the kernel lays all registers on the stack.
#[test]
fn handshakes_leave_nothing_of_the_key_outside_the_arena() {
    let name =
        "upstream::tls::client_key::residue::handshakes_leave_nothing_of_the_key_outside_the_arena";
    let Some(role) = isolated::role() else {
        let authority = Authority::new();
        let root = authority.root();
        for (file, pkcs8, kind) in KEYS {
            let all = patterns(file, pkcs8, kind);
            let words: Vec<String> =
                all.iter().map(|(_, bytes)| HEXLOWER.encode(&turned(bytes))).collect();
            let certificate = authority.certify(pkcs8);
            let (certificate, root) = (certificate.display(), root.display());
            let search = |way: &str| {
                let role = format!("{way} {file} {certificate} {root} {}", words.join(" "));
                let done = isolated::again(name, &role);
                assert!(done.success, "{file} {way}: {}", done.said);
                done.said
            };
            let found = |said: &str, place: &str| -> Vec<&'static str> {
                let lines = said.lines().filter_map(|line| line.strip_prefix(place));
                lines.map(|line| all[line.trim().parse::<usize>().unwrap()].0).collect()
            };
            let said = search("arena");
            assert_eq!(found(&said, "outside"), [""; 0], "{file}: {said}");
            // Controls: the search sees the key in the arena, and a key that is held elsewhere.
            let secret = all.last().unwrap().0;
            let inside = found(&said, "arena");
            assert!(!inside.is_empty() && !inside.contains(&"text"), "{file}: {inside:?} {secret}");
            let held = found(&search("held"), "outside");
            assert!(held.iter().any(|name| *name != "text"), "{file}: {held:?}");
        }
        return;
    };
    let mut words = role.split(' ');
    let (way, file) = (words.next().unwrap().to_owned(), words.next().unwrap());
    let (certificate, root) = (words.next().unwrap(), words.next().unwrap());
    let patterns: Vec<Vec<u8>> =
        words.map(|word| HEXLOWER.decode(word.as_bytes()).unwrap()).collect();

    let arena = Arena::map(BackendChoice::Memfd, 64 * 1024).unwrap();
    let client = client(PathBuf::from(certificate), file);
    client.load_key(&arena).unwrap();
    let (config, _roots) = client_config(Check::Nothing, None, Some(&client)).unwrap();
    let server = server(root.as_ref());
    let handshake = move || shake(Arc::clone(&config), Arc::clone(&server)).unwrap();
    // As rustls would keep it.
    let held = (way == "held").then(|| {
        let der = PrivateKeyDer::from_pem_file(key_file(file)).unwrap();
        rustls::crypto::ring::default_provider().key_provider.load_private_key(der).unwrap()
    });

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (done, is_done) = mpsc::channel();
    let (keep, is_kept) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let on_a_thread = handshake.clone();
        scope.spawn(move || {
            on_a_thread();
            done.send(()).unwrap();
            let _ = is_kept.recv();
        });
        runtime.block_on(async {
            #[expect(clippy::disallowed_methods, reason = "a worker of the test's own")]
            tokio::spawn({
                let handshake = handshake.clone();
                async move { handshake() }
            })
            .await
            .unwrap();
            tokio::task::spawn_blocking(handshake.clone()).await.unwrap();
        });
        is_done.recv().unwrap();
        let _entered = runtime.enter();
        let _handled = signal(SignalKind::user_defined1()).unwrap();
        deep_down(|| {
            handshake();
            handshake();
            sys::interrupt_this_thread();
        });
        // The test runner's own line is still open.
        println!();
        for (index, mapping) in isolated::copies(&patterns) {
            let place = if mapping.starts_with("/memfd:") { "arena" } else { "outside" };
            println!("{place} {index}");
        }
        drop(keep);
    });
    drop(held);
}

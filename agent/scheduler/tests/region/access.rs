//! An etcd that wants certificates and a password, and one that is full.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serio_scheduler::{
    config::Access,
    store::{
        Backend, Change, Kind, StoreError,
        etcd::{Client as Etcd, Etcd as Leader, EtcdError},
    },
};
use tonic::{Request, client::Grpc, codegen::http::uri::PathAndQuery, transport::Endpoint};
use tonic_prost::ProstCodec;

use crate::processes::{Cluster, PATIENCE, leader, memory_folder, scheduler, within};

/// Two texts, as etcd's messages about users and roles begin.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Two {
    #[prost(string, tag = "1")]
    first: String,
    #[prost(string, tag = "2")]
    second: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Nothing {}

/// The user root with that password, and nobody without one.
async fn turn_authentication_on(address: &str, password: &str) {
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    for (path, first, second) in [
        ("/etcdserverpb.Auth/UserAdd", "root", password),
        ("/etcdserverpb.Auth/RoleAdd", "root", ""),
        ("/etcdserverpb.Auth/UserGrantRole", "root", "root"),
        ("/etcdserverpb.Auth/AuthEnable", "", ""),
    ] {
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let message = Request::new(Two { first: first.into(), second: second.into() });
        let codec = ProstCodec::<Two, Nothing>::default();
        grpc.unary(message, PathAndQuery::from_static(path), codec).await.unwrap();
    }
}

/// An authority, and a certificate of it for this machine, in those files.
fn certificates(folder: &Path) -> [PathBuf; 3] {
    let files = ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name));
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = params.signed_by(&key, &issuer).unwrap();
    for (file, text) in files.iter().zip([ca.pem(), cert.pem(), key.serialize_pem()]) {
        std::fs::write(file, text).unwrap();
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_may_want_certificates() {
    let folder = memory_folder();
    let [ca, cert, key] = certificates(folder.path());
    let [ca_text, cert_text, key_text] = [&ca, &cert, &key].map(|path| path.to_str().unwrap());
    let more = [
        "--cert-file",
        cert_text,
        "--key-file",
        key_text,
        "--client-cert-auth",
        "--trusted-ca-file",
        ca_text,
    ];
    let Some(cluster) = Cluster::start_with(folder.path(), 1, &more) else { return };
    let access = Access { ca: Some(ca.clone()), identity: Some((cert.clone(), key.clone())), user: None };
    let etcd = Etcd::with(&cluster.addresses(), &access).unwrap();
    let ready = async { while etcd.region_id().await.is_err() {} };
    within("etcd gets ready", PATIENCE, ready).await;
    // Without ours, or in the clear, there is nothing.
    for access in [Access { identity: None, ..access.clone() }, Access::default()] {
        let stranger = Etcd::with(&cluster.addresses(), &access).unwrap();
        assert!(matches!(stranger.region_id().await, Err(StoreError::Unreachable(_))), "{access:?}");
    }
    let missing = Access { ca: Some("/nowhere/ca.pem".into()), ..access };
    let error = Etcd::with(&cluster.addresses(), &missing).unwrap_err();
    assert!(matches!(error, EtcdError::File { .. }), "{error}");

    let store = cluster.store();
    let flags = ["--store", &store, "--etcd-ca", ca_text, "--etcd-cert", cert_text, "--etcd-key", key_text];
    let (_scheduler, address) = scheduler(&flags);
    leader(&[address]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_may_want_a_password() {
    let folder = memory_folder();
    let Some((mut cluster, stranger)) = Cluster::start(folder.path(), 1).await else { return };
    turn_authentication_on(&cluster.addresses()[0], "secret").await;
    let password = folder.path().join("password");
    std::fs::write(&password, "secret\n").unwrap();
    let access = Access { user: Some(("root".into(), password.clone())), ..Access::default() };
    let etcd = Etcd::with(&cluster.addresses(), &access).unwrap();
    let id = etcd.region_id().await.unwrap();
    assert!(matches!(stranger.region_id().await, Err(StoreError::Refused(_))));
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "guess").unwrap();
    let guess = Access { user: Some(("root".into(), wrong)), ..Access::default() };
    let error = Etcd::with(&cluster.addresses(), &guess).unwrap().region_id().await.unwrap_err();
    assert!(error.to_string().contains("authentication failed"), "{error}");

    let store = cluster.store();
    let flags =
        ["--store", &store, "--etcd-user", "root", "--etcd-password-file", password.to_str().unwrap()];
    let (_scheduler, address) = scheduler(&flags);
    leader(std::slice::from_ref(&address)).await;
    // A member that starts again has forgotten whom it believed.
    cluster.kill(0);
    cluster.restart(0);
    let again = async {
        while etcd.region_id().await.ok().as_ref() != Some(&id) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within("etcd believes us again", PATIENCE, again).await;
    leader(&[address]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_full_is_named() {
    let folder = memory_folder();
    let more = ["--quota-backend-bytes", "2000000"];
    let Some(cluster) = Cluster::start_with(folder.path(), 1, &more) else { return };
    let etcd = Etcd::new(&cluster.addresses()).unwrap();
    let ready = async { while etcd.region_id().await.is_err() {} };
    within("etcd gets ready", PATIENCE, ready).await;
    let lease = etcd.grant(60).await.unwrap();
    let candidate = etcd.stand(lease, "here:1").await.unwrap();
    let mut leader = Leader::new(etcd, candidate);
    let filled = tokio::task::spawn_blocking(move || {
        // etcd looks at the size of what it has written out: a quick writer is far ahead of that.
        (0..2_000).find_map(|number| {
            let value = Some(vec![0; 100_000]);
            let change = Change { kind: Kind::Plan, key: format!("p{number}"), value };
            leader.write(&[change]).err()
        })
    });
    let error = filled.await.unwrap().expect("2 MB hold no 200 MB");
    assert!(matches!(error, StoreError::Full), "{error:?}");
    assert!(error.to_string().contains("NOSPACE") && error.to_string().contains("etcdctl alarm disarm"));
}

//! Keys in a directory: made once, rotated, destroyed; what is missing or damaged is named.

use std::os::unix::fs::PermissionsExt;

use super::*;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        for (name, fill) in [("old", 1), ("new", 2)] {
            fs::write(place.kek(name), [fill; 32]).unwrap();
            fs::set_permissions(place.kek(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        place
    }
    fn kek(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn keys(&self, source: &str, previous: &[&str]) -> Keys {
        let named = |name: &&str| format!("file:{}", self.kek(name).display());
        let previous: Vec<_> = previous.iter().map(named).collect();
        Keys::new(self.dir.path(), &if source.is_empty() { String::new() } else { named(&source) }, &previous)
            .unwrap()
    }
}

#[tokio::test]
async fn a_key_is_made_once_and_survives_rotation() {
    let place = Place::new();
    let vdc = Uuid::new_v4();
    let keys = place.keys("old", &[]);
    assert!(matches!(keys.open(vdc).await, Err(KeysError::Missing(_))));
    keys.ensure(vdc).await.unwrap();
    let key = keys.open(vdc).await.unwrap();
    keys.ensure(vdc).await.unwrap();
    assert_eq!(keys.open(vdc).await.unwrap(), key, "made once");
    let mode = fs::metadata(keys.path(vdc)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let moved = place.keys("new", &[]);
    assert!(matches!(moved.open(vdc).await, Err(KeysError::OtherKek { .. })));
    let moved = place.keys("new", &["old"]);
    assert_eq!(moved.open(vdc).await.unwrap(), key);
    let rotated = moved.rotate(vdc).await.unwrap();
    assert_ne!(rotated.from, rotated.to);
    assert_eq!(place.keys("new", &[]).open(vdc).await.unwrap(), key, "the old one is not needed any more");
    assert!(place.keys("old", &[]).open(vdc).await.is_err());
}

#[tokio::test]
async fn what_is_destroyed_stays_so() {
    let place = Place::new();
    let vdc = Uuid::new_v4();
    let keys = place.keys("old", &[]);
    keys.ensure(vdc).await.unwrap();
    let bytes = fs::read(keys.path(vdc)).unwrap();
    // As after a crash between the note and the destruction.
    fs::write(keys.erased_path(vdc), b"{}").unwrap();
    assert_eq!(keys.half_erased().unwrap(), [vdc]);
    assert!(matches!(keys.open(vdc).await, Err(KeysError::Erased(_))), "meant is as good as done");
    let destroyed = keys.destroy(vdc).await.unwrap().unwrap();
    assert_eq!(destroyed.blake3, blake3::hash(&bytes).to_hex().to_string());
    assert!(!keys.path(vdc).exists() && keys.half_erased().unwrap().is_empty());
    assert_eq!(keys.destroy(vdc).await.unwrap(), None);
    for refused in [keys.ensure(vdc).await, keys.rotate(vdc).await.map(drop), keys.open(vdc).await.map(drop)]
    {
        assert!(matches!(refused, Err(KeysError::Erased(_))), "{refused:?}");
    }
    keys.forget(vdc).await.unwrap();
    assert!(matches!(keys.open(vdc).await, Err(KeysError::Missing(_))));
}

#[tokio::test]
async fn a_node_without_a_source_says_so() {
    let place = Place::new();
    let keys = place.keys("", &[]);
    assert!(matches!(keys.check().await, Err(KeysError::NotConfigured)));
    assert!(matches!(keys.ensure(Uuid::new_v4()).await, Err(KeysError::NotConfigured)));
    assert!(Keys::new(place.dir.path(), "nonsense", &[]).is_err());
    place.keys("old", &[]).check().await.unwrap();
    fs::remove_file(place.kek("old")).unwrap();
    assert!(matches!(place.keys("old", &[]).check().await, Err(KeysError::Source(SourceError::Read(..)))));
}

#[tokio::test]
async fn volumes_have_the_key_of_their_vdc() {
    let place = Place::new();
    let keys = place.keys("old", &[]);
    let (vdc, volume, copy, plain) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    keys.assign(volume, vdc).await.unwrap();
    keys.assign_like(copy, volume).await.unwrap();
    keys.assign_like(plain, Uuid::new_v4()).await.unwrap();
    let key = keys.open(vdc).await.unwrap();
    assert_eq!(keys.key_of(volume).await.unwrap(), Some(key.clone()));
    assert_eq!(keys.key_of(copy).await.unwrap(), Some(key));
    assert_eq!(keys.key_of(plain).await.unwrap(), None);
    assert!(keys.half_erased().unwrap().is_empty());
    keys.destroy(vdc).await.unwrap();
    assert!(matches!(keys.key_of(copy).await, Err(KeysError::Erased(_))));
    keys.unassign(copy);
    assert_eq!(keys.key_of(copy).await.unwrap(), None);
}

#[tokio::test]
async fn damage_is_named() {
    let place = Place::new();
    let vdc = Uuid::new_v4();
    let keys = place.keys("old", &[]);
    keys.ensure(vdc).await.unwrap();
    fs::write(keys.path(vdc), b"{}").unwrap();
    assert!(matches!(keys.open(vdc).await, Err(KeysError::Damaged(_))));
    assert!(
        matches!(keys.ensure(vdc).await, Err(KeysError::Damaged(_))),
        "never made again over a damaged one"
    );
}

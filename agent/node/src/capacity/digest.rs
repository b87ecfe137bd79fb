//! The digest by which node and scheduler see whether they agree on what is promised.
//!
//! blake3 over the promises sorted by id (as bytes), each as one line of fields with a tab between and `\n` behind:
//! `id generation resource state class vcpus memory_bytes`, numbers in decimal, enums as their protobuf number. In
//! lower-case hex. An empty list is the digest of no bytes.

use serio_api::v1::Allocation;

/// See the head of this file.
#[must_use]
pub fn digest(allocations: &[Allocation]) -> String {
    let mut sorted: Vec<&Allocation> = allocations.iter().collect();
    sorted.sort_by(|a, b| a.id.cmp(&b.id));
    let mut hash = blake3::Hasher::new();
    for a in sorted {
        let numbers =
            [a.generation.to_string(), a.state.to_string(), a.class.to_string(), a.vcpus.to_string()];
        let [generation, state, class, vcpus] = &numbers;
        let memory = a.memory_bytes.to_string();
        let line =
            [&a.id, generation, &a.resource, state, class, vcpus, &memory].map(String::as_str).join("\t");
        hash.update(line.as_bytes());
        hash.update(b"\n");
    }
    hash.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_does_not_matter_and_everything_else_does() {
        let a = Allocation { id: "a".into(), generation: 1, resource: "r".into(), ..Default::default() };
        let b = Allocation { id: "b".into(), vcpus: 2, ..a.clone() };
        assert_eq!(digest(&[a.clone(), b.clone()]), digest(&[b.clone(), a.clone()]));
        assert_ne!(digest(std::slice::from_ref(&a)), digest(&[Allocation { memory_bytes: 1, ..a.clone() }]));
        assert_ne!(digest(std::slice::from_ref(&a)), digest(&[Allocation { state: 1, ..a.clone() }]));
        assert_eq!(digest(&[]), blake3::hash(b"").to_hex().to_string());
        // Written out by hand, so that a change of the form is noticed.
        assert_eq!(digest(&[a]), blake3::hash(b"a\t1\tr\t0\t0\t0\t0\n").to_hex().to_string());
    }
}

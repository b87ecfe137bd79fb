//! Admission: whether what is asked still fits. Pure functions.
//!
//! Owns: the arithmetic of quotas and the words of a refusal. Never: state, clocks, I/O.
//! Invariant: what is admitted never brings a pool over its limit, whatever the numbers (no overflow).
#![forbid(unsafe_code)]

pub mod ledger;

use std::fmt;

use serio_types::{ByteSize, Quota};

/// What there is only so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Virtual processors.
    Vcpus,
    /// Guest memory.
    Memory,
    /// Volumes as provisioned.
    Storage,
    /// Snapshots of volumes.
    Snapshots,
}

impl Resource {
    const ALL: [Self; 3] = [Self::Vcpus, Self::Memory, Self::Storage];

    /// Its name in messages and in the API's fields.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::Storage => "storage",
            Self::Snapshots => "snapshots",
        }
    }

    const fn of(self, quota: &Quota) -> u64 {
        match self {
            Self::Vcpus => quota.vcpus,
            Self::Memory => quota.memory_bytes,
            Self::Storage => quota.storage_bytes,
            // Not an amount of a quota: see `admit_snapshots`.
            Self::Snapshots => 0,
        }
    }

    fn show(self, amount: u64) -> String {
        match self {
            Self::Vcpus | Self::Snapshots => amount.to_string(),
            Self::Memory | Self::Storage => ByteSize::from_bytes(amount).to_string(),
        }
    }
}

/// Whose limit it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A vdc's quota.
    Vdc(String),
    /// The node's capacity.
    Node,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vdc(name) => write!(f, "the quota of vdc {name}"),
            Self::Node => f.write_str("the capacity of this node"),
        }
    }
}

/// Something with a limit and a part of it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Whose.
    pub owner: Owner,
    /// At most.
    pub limit: Quota,
    /// Promised already.
    pub used: Quota,
}

/// Why something does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {asked} asked, {available} available: {owner} is {limit}, of which {used} is in use; {remedy}", resource = .resource.name(), asked = .resource.show(*.asked), available = .resource.show(self.available()), limit = .resource.show(*.limit), used = .resource.show(*.used), remedy = self.remedy())]
pub struct Refusal {
    /// What is short.
    pub resource: Resource,
    /// Whose limit.
    pub owner: Owner,
    /// How much was asked.
    pub asked: u64,
    /// The limit.
    pub limit: u64,
    /// In use.
    pub used: u64,
}

impl Refusal {
    /// What could still be had.
    #[must_use]
    pub const fn available(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    /// What to do.
    #[must_use]
    pub fn remedy(&self) -> String {
        match &self.owner {
            Owner::Vdc(name) => {
                format!("ask for less, delete what vdc {name} does not need, or raise its quota")
            }
            Owner::Node => "ask for less, delete what is not needed here, or use another node".to_owned(),
        }
    }
}

/// Says whether `ask` fits every pool; the first that it does not fit is the refusal.
pub fn admit(pools: &[Pool], ask: &Quota) -> Result<(), Refusal> {
    for pool in pools {
        for resource in Resource::ALL {
            let (limit, used, asked) = (resource.of(&pool.limit), resource.of(&pool.used), resource.of(ask));
            // Nothing asked of a resource is never refused for it: a quota may be below its use after a capacity loss.
            if asked > 0 && used.checked_add(asked).is_none_or(|sum| sum > limit) {
                return Err(Refusal { resource, owner: pool.owner.clone(), asked, limit, used });
            }
        }
    }
    Ok(())
}

/// Says whether a quota may shrink to `limit` while `used` is in use; `Err` names what is in the way.
pub fn admit_quota(name: &str, limit: &Quota, used: &Quota) -> Result<(), Refusal> {
    for resource in Resource::ALL {
        let (limit, used) = (resource.of(limit), resource.of(used));
        if used > limit {
            return Err(Refusal { resource, owner: Owner::Vdc(name.to_owned()), asked: used, limit, used });
        }
    }
    Ok(())
}

/// Says whether a vdc may have `asked` snapshots more; a limit of 0 is none.
pub fn admit_snapshots(name: &str, limit: u32, used: u64, asked: u64) -> Result<(), Refusal> {
    let limit = u64::from(limit);
    if limit > 0 && used.checked_add(asked).is_none_or(|sum| sum > limit) {
        let owner = Owner::Vdc(name.to_owned());
        return Err(Refusal { resource: Resource::Snapshots, owner, asked, limit, used });
    }
    Ok(())
}

/// The sum of two amounts; saturates.
#[must_use]
pub const fn add(a: &Quota, b: &Quota) -> Quota {
    Quota {
        vcpus: a.vcpus.saturating_add(b.vcpus),
        memory_bytes: a.memory_bytes.saturating_add(b.memory_bytes),
        storage_bytes: a.storage_bytes.saturating_add(b.storage_bytes),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quota() -> impl Strategy<Value = Quota> {
        let amount = || prop_oneof![0_u64..100, Just(u64::MAX), any::<u64>()];
        (amount(), amount(), amount()).prop_map(|(vcpus, memory_bytes, storage_bytes)| Quota {
            vcpus,
            memory_bytes,
            storage_bytes,
        })
    }

    proptest! {
        #[test]
        fn never_over_a_limit(limit in quota(), asks in proptest::collection::vec(quota(), 0..20)) {
            let mut pool = Pool { owner: Owner::Node, limit, used: Quota::default() };
            for ask in asks {
                if admit(std::slice::from_ref(&pool), &ask).is_ok() {
                    pool.used = add(&pool.used, &ask);
                }
                prop_assert!(pool.used.vcpus <= limit.vcpus);
                prop_assert!(pool.used.memory_bytes <= limit.memory_bytes);
                prop_assert!(pool.used.storage_bytes <= limit.storage_bytes);
            }
        }

        #[test]
        fn what_is_available_is_admitted(limit in quota(), used in quota()) {
            let pool = Pool { owner: Owner::Node, limit, used };
            let rest = Quota {
                vcpus: limit.vcpus.saturating_sub(used.vcpus),
                memory_bytes: limit.memory_bytes.saturating_sub(used.memory_bytes),
                storage_bytes: limit.storage_bytes.saturating_sub(used.storage_bytes),
            };
            prop_assert_eq!(admit(&[pool], &rest), Ok(()));
        }
    }

    #[test]
    fn snapshots_are_counted() {
        assert_eq!(admit_snapshots("a", 0, u64::MAX, 1), Ok(()), "no limit");
        assert_eq!(admit_snapshots("a", 3, 2, 1), Ok(()));
        let refusal = admit_snapshots("ardesio", 3, 2, 2).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "snapshots: 2 asked, 1 available: the quota of vdc ardesio is 3, of which 2 is in use; ask for less, delete what \
             vdc ardesio does not need, or raise its quota"
        );
        assert!(admit_snapshots("a", 3, 1, u64::MAX).is_err());
    }

    #[test]
    fn a_refusal_names_everything() {
        let pool = Pool {
            owner: Owner::Vdc("ardesio".to_owned()),
            limit: Quota { vcpus: 4, memory_bytes: 4 << 30, storage_bytes: 20 << 30 },
            used: Quota { vcpus: 1, memory_bytes: 256 << 20, storage_bytes: 1 << 30 },
        };
        let ask = Quota { vcpus: 1, memory_bytes: 8 << 30, storage_bytes: 0 };
        let refusal = admit(&[pool], &ask).unwrap_err();
        assert_eq!(refusal.resource, Resource::Memory);
        assert_eq!(
            refusal.to_string(),
            "memory: 8GiB asked, 3840MiB available: the quota of vdc ardesio is 4GiB, of which 256MiB is in use; ask for less, \
             delete what vdc ardesio does not need, or raise its quota"
        );
    }
}

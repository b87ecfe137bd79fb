//! What the owner does for placements, fences and plans: each method is one step, and durable when its caller hears of it.

use serio_api::v1::{
    AllocationClass, Commit, NodeRecord, PlaceRequest, Placement, PlacementState, RecoveryPlan, Release,
    Reserve, Reserved, Veto, answer, scheduler_message::What,
};
use serio_types::Name;
use tokio::sync::oneshot;

use super::core::Core;
use crate::{
    book::PLACEMENTS_MAX,
    error::OrderError,
    placement::{self, Members, Plan, Question, Wish},
    store::Kind,
};

/// Recovery plans that are kept.
const PLANS_MAX: usize = 10_000;

/// How a request begins.
#[derive(Debug)]
pub enum Begin {
    /// It has a placement already.
    Done(Box<Placement>),
    /// It is being placed from now on; it must be settled or abandoned.
    Start,
}

/// A node that was asked.
#[derive(Debug)]
pub struct Asked {
    /// Which.
    pub node: Name,
    /// What it will say.
    pub answer: oneshot::Receiver<answer::What>,
    /// How it was chosen.
    pub plan: Plan,
    /// Its fencing generation.
    pub fence_generation: u64,
}

impl Core {
    /// Takes up a request, or says what came of it.
    ///
    /// # Errors
    /// When it is another one than before, is under way, or its resource is promised already.
    pub fn begin(&mut self, id: &Name, request: &PlaceRequest) -> Result<Begin, OrderError> {
        self.lead()?;
        if let Some(placement) = self.book.get(id) {
            if placement.request.as_ref() != Some(request) {
                return Err(OrderError::OtherRequest(id.clone()));
            }
            return Ok(Begin::Done(Box::new(placement.clone())));
        }
        let resource = &request.resource;
        if self.placing.contains_key(id) || self.placing.values().any(|other| other == resource) {
            return Err(OrderError::UnderWay(id.clone()));
        }
        if self.book.len().saturating_add(self.placing.len()) >= PLACEMENTS_MAX {
            return Err(OrderError::TooMany("placements"));
        }
        if let Some(node) =
            self.book.holder(resource).or_else(|| self.inventory.holder(resource, id.as_str()))
        {
            return Err(OrderError::Held { resource: resource.clone(), node: node.clone() });
        }
        self.placing.insert(id.clone(), resource.clone());
        Ok(Begin::Start)
    }

    /// Chooses a node and asks it.
    ///
    /// # Errors
    /// When none is left.
    pub fn choose(
        &mut self,
        id: &Name,
        request: &PlaceRequest,
        vetoes: &[Veto],
        seed: u64,
    ) -> Result<Asked, OrderError> {
        self.lead()?;
        let group = &request.anti_affinity_group;
        let nodes = if group.is_empty() { Vec::new() } else { self.book.group(&request.vdc, group) };
        let refused: Vec<Name> =
            vetoes.iter().filter_map(|veto| veto.node.strip_prefix("nodes/")?.parse().ok()).collect();
        let wish = Wish::of(request);
        let question = Question { wish: &wish, members: &Members { nodes }, refused: &refused, seed };
        let plan = placement::plan(&question, self.inventory.candidates(self.since_start()));
        tracing::debug!(request = %id, counts = plan.counts(), candidates = plan.nodes.len(), "planned");
        // A scheduler that died may have had a node's promise already: that node says the same again.
        let promised =
            |node: &&Name| self.inventory.view(node).is_some_and(|view| view.keys.contains(id.as_str()));
        let Some(node) = plan.nodes.iter().find(promised).or(plan.nodes.first()).cloned() else {
            tracing::info!(request = %id, counts = plan.counts(), "no node takes it");
            return Err(self.no_node(request, &plan, vetoes));
        };
        let fence_generation = self.inventory.fence_generation(&node);
        self.inventory.expect(&node, id.as_str(), wish.need);
        let answer = self.order(&node, |call| {
            What::Reserve(Reserve {
                call,
                key: id.to_string(),
                expected_generation: 0,
                ttl_ms: request.ttl_ms,
                resource: request.resource.clone(),
                vcpus: request.vcpus,
                memory_bytes: request.memory_bytes,
                storage_bytes: request.storage_bytes,
                class: request.class,
                numa_node: None,
                one_numa_node: false,
                fence_generation,
            })
        })?;
        Ok(Asked { node, answer, plan, fence_generation })
    }

    fn no_node(&self, request: &PlaceRequest, plan: &Plan, vetoes: &[Veto]) -> OrderError {
        let held = if request.class() == AllocationClass::DrHeld { " held for recovery" } else { "" };
        let refused: Vec<String> =
            vetoes.iter().map(|veto| format!("{} refused: {}", veto.node, veto.message)).collect();
        OrderError::NoNode {
            nodes: u32::try_from(self.inventory.len()).unwrap_or(u32::MAX),
            wish: format!(
                "{} vcpus, {} of memory, {} of storage{held}",
                request.vcpus,
                serio_types::ByteSize::from_bytes(request.memory_bytes),
                serio_types::ByteSize::from_bytes(request.storage_bytes),
            ),
            counts: plan.counts(),
            vetoes: if refused.is_empty() { String::new() } else { format!("; {}", refused.join("; ")) },
        }
    }

    /// The node promised it: from now on it is on record.
    ///
    /// # Errors
    /// When this scheduler has lost the lead meanwhile; the node then ends it by its ttl.
    pub fn settle(
        &mut self,
        id: &Name,
        request: PlaceRequest,
        asked: (&Name, &Plan, u64),
        reserved: &Reserved,
        vetoes: Vec<Veto>,
    ) -> Result<Placement, OrderError> {
        self.lead()?;
        if self.placing.remove(id).is_none() {
            return Err(OrderError::NotLeader(String::new()));
        }
        let (node, plan, fence_generation) = asked;
        let placement = Placement {
            name: format!("placements/{id}"),
            request: Some(request),
            node: format!("nodes/{node}"),
            token: reserved.token.clone(),
            numa_node: reserved.numa_node,
            state: PlacementState::Reserved.into(),
            create_time: Some(self.now.wall),
            filters: plan.filters.clone(),
            vetoes,
            reason: String::new(),
            fence_generation,
        };
        self.book.insert(self.since_start(), id.clone(), placement.clone());
        self.dirty(Kind::Placement, id.clone());
        Ok(placement)
    }

    /// A node said no, or nothing.
    pub fn refused_by(&mut self, id: &Name, node: &Name, silent: bool) {
        // A silent one may have it: that counts until its list, or its end, says otherwise.
        if !silent {
            self.inventory.expect_no_more(node, id.as_str());
        }
    }

    /// Nothing came of a request.
    pub fn abandon(&mut self, id: &Name) {
        self.placing.remove(id);
    }

    fn known(&self, id: &Name) -> Result<&Placement, OrderError> {
        self.book.get(id).ok_or_else(|| OrderError::Unknown(format!("placements/{id}")))
    }

    /// One.
    ///
    /// # Errors
    /// When it is not known, or forgotten.
    pub fn placement(&self, id: &Name) -> Result<Placement, OrderError> {
        self.known(id).cloned()
    }

    /// What came of an order. Who has lost the lead while a node was asked knows it no more, or from a copy that is late.
    ///
    /// # Errors
    /// When this scheduler does not lead (any more), or it is not known.
    pub fn outcome(&self, id: &Name) -> Result<Placement, OrderError> {
        self.lead()?;
        self.placement(id)
    }

    fn node_of(&self, id: &Name) -> Result<Name, OrderError> {
        self.book.node(id).cloned().ok_or_else(|| OrderError::Unknown(format!("placements/{id}")))
    }

    fn not_in_state(id: &Name, placement: &Placement) -> OrderError {
        OrderError::State { id: id.clone(), state: placement.state(), reason: placement.reason.clone() }
    }

    /// Asks the node to keep it; none when it does already.
    ///
    /// # Errors
    /// When it is over, or the node cannot be asked.
    pub fn commit_order(
        &mut self,
        id: &Name,
    ) -> Result<Option<(Name, oneshot::Receiver<answer::What>)>, OrderError> {
        self.lead()?;
        let placement = self.known(id)?;
        match placement.state() {
            PlacementState::Committed => return Ok(None),
            PlacementState::Reserved => {}
            _ => return Err(Self::not_in_state(id, placement)),
        }
        let (node, token) = (self.node_of(id)?, placement.token.clone());
        let answer = self.order(&node, |call| What::Commit(Commit { call, token }))?;
        Ok(Some((node, answer)))
    }

    /// The node's word on it.
    ///
    /// # Errors
    /// When it is over.
    pub fn commit_answered(&mut self, id: &Name, what: &answer::What) -> Result<Placement, OrderError> {
        self.lead()?;
        let (node, now) = (self.node_of(id)?, self.since_start());
        let placement = self.known(id)?;
        if placement.state() != PlacementState::Reserved {
            return match placement.state() {
                PlacementState::Committed => Ok(placement.clone()),
                _ => Err(Self::not_in_state(id, placement)),
            };
        }
        self.dirty(Kind::Placement, id.clone());
        if let answer::What::Refused(refused) = what {
            self.book.end(now, id, &format!("the node ended it: {}", refused.message));
            self.inventory.expect_no_more(&node, id.as_str());
            return Err(OrderError::Refused { node, refused: refused.clone() });
        }
        self.book.set(now, id, PlacementState::Committed, "");
        self.placement(id)
    }

    /// Asks the node to give it back; none when that is done or it cannot be asked now: it is told later.
    ///
    /// # Errors
    /// When it is not known.
    pub fn release_order(
        &mut self,
        id: &Name,
    ) -> Result<Option<oneshot::Receiver<answer::What>>, OrderError> {
        self.lead()?;
        let placement = self.known(id)?;
        if placement.state() == PlacementState::Released {
            return Ok(None);
        }
        let (node, token) = (self.node_of(id)?, placement.token.clone());
        self.book.set(self.since_start(), id, PlacementState::Releasing, "released by its caller");
        self.dirty(Kind::Placement, id.clone());
        Ok(self.order(&node, |call| What::Release(Release { call, token })).ok())
    }

    /// Records that a node is dead.
    ///
    /// # Errors
    /// When it is not known, or alive.
    pub fn fence_node(&mut self, name: &Name, proof: &str) -> Result<NodeRecord, OrderError> {
        self.lead()?;
        let generation = self.inventory.fence(self.now, name, proof)?;
        tracing::warn!(node = %name, generation, proof, "fenced a node: what it had may be placed anew");
        self.dirty(Kind::Node, name.clone());
        for id in self.book.fenced(self.since_start(), name) {
            self.dirty(Kind::Placement, id);
        }
        self.node_record(name)
    }

    /// Forgets a lost node.
    ///
    /// # Errors
    /// When it is not known, not lost, or may still run something.
    pub fn forget_node(&mut self, name: &Name) -> Result<(), OrderError> {
        self.lead()?;
        self.inventory.forget(self.since_start(), name)?;
        self.dirty(Kind::Node, name.clone());
        tracing::info!(node = %name, "forgot a lost node");
        Ok(())
    }

    /// What is known of a node.
    ///
    /// # Errors
    /// When nothing is.
    pub fn node_record(&self, name: &Name) -> Result<NodeRecord, OrderError> {
        let found = self.inventory.get(self.since_start(), name).map(|record| self.as_seen_here(record));
        found.ok_or_else(|| OrderError::Forget(crate::inventory::ForgetError::Unknown(name.clone())))
    }

    /// All nodes, or those of a site.
    #[must_use]
    pub fn node_records(&self, site: &str) -> Vec<NodeRecord> {
        let all = self.inventory.list(self.since_start(), site);
        all.into_iter().map(|record| self.as_seen_here(record)).collect()
    }

    /// A copy knows nothing of leases.
    fn as_seen_here(&self, mut record: NodeRecord) -> NodeRecord {
        if self.lead().is_err() {
            record.freshness = 0;
        }
        record
    }

    /// Keeps a recovery plan.
    ///
    /// # Errors
    /// When another version is there.
    pub fn put_plan(
        &mut self,
        vdc: &Name,
        document: Vec<u8>,
        expected: u64,
    ) -> Result<RecoveryPlan, OrderError> {
        self.lead()?;
        self.check_version(vdc, expected)?;
        if expected == 0 && self.plans.len() >= PLANS_MAX {
            return Err(OrderError::TooMany("recovery plans"));
        }
        let plan = RecoveryPlan {
            name: format!("plans/{vdc}"),
            version: expected.saturating_add(1),
            document,
            update_time: Some(self.now.wall),
        };
        self.plans.insert(vdc.clone(), plan.clone());
        self.dirty(Kind::Plan, vdc.clone());
        Ok(plan)
    }

    fn check_version(&self, vdc: &Name, expected: u64) -> Result<(), OrderError> {
        let found = self.plans.get(vdc).map_or(0, |plan| plan.version);
        if found == expected {
            return Ok(());
        }
        Err(OrderError::Version { name: format!("plans/{vdc}"), found, expected })
    }

    /// Removes a recovery plan.
    ///
    /// # Errors
    /// When there is none, or another version.
    pub fn delete_plan(&mut self, vdc: &Name, expected: u64) -> Result<(), OrderError> {
        self.lead()?;
        if !self.plans.contains_key(vdc) {
            return Err(OrderError::Unknown(format!("plans/{vdc}")));
        }
        self.check_version(vdc, expected)?;
        self.plans.remove(vdc);
        self.dirty(Kind::Plan, vdc.clone());
        Ok(())
    }
}

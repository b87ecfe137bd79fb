//! The meter: what each vdc uses, for invoices.
//!
//! ```text
//!   every interval:  holdings (state) ─▶ read (/proc, cgroups, taps) ─▶ count (pure) ─┐
//!                    energy (sysfs) ──────────────────────────────▶ share (pure) ─────┴─▶ meter.db, one transaction
//! ```
//!
//! Owns: `meter.db`, the last look, the energy of the host since seriod's start. Never: quotas, and never a guess: what is not
//! measured is absent. A look that cannot be written is made again whole at the next interval.
//! Threads: the looks and the questions run on blocking threads, under one lock.

mod calendar;
pub mod count;
mod read;

#[cfg(test)]
mod count_test;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use serio_store::{
    StoreError,
    meter::{Amounts, MeterStore, UsageRow},
};
use serio_types::Name;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use uuid::Uuid;

pub use calendar::{Granularity, Span, spans};

use self::{
    count::{Carry, Counted, count},
    read::HostTimes,
};
use crate::{
    energy::{Consumer, EnergySettings, Host, Reader, carbon_mg, share},
    error::{Error, chain},
    state::holdings::Holdings,
    supervise::Supervisor,
};

/// How the meter works.
#[derive(Debug, Clone)]
pub struct MeterSettings {
    /// `STATE/meter.db`.
    pub path: PathBuf,
    /// Between two looks.
    pub interval: Duration,
    /// Of the energy.
    pub energy: EnergySettings,
}

/// The host's energy since seriod's start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EnergyNow {
    /// How it is measured; `None`: it is not.
    pub method: Option<&'static str>,
    /// All.
    pub total_uj: u64,
    /// Of that, nobody's.
    pub idle_uj: u64,
    /// Of that, what ran beside VMs.
    pub host_uj: u64,
    /// Over the last interval; `None` before the second look.
    pub watts: Option<f64>,
    /// Grams of CO2 for a kWh, if anybody says.
    pub carbon_grams_per_kwh: Option<f64>,
}

/// Meters. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Meter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: MeterSettings,
    supervisor: Supervisor,
    holdings: watch::Receiver<Holdings>,
    now: Mutex<Now>,
    /// A copy for those who must not wait while a look is written.
    energy: Mutex<EnergyNow>,
}

#[derive(Debug)]
struct Now {
    /// Why there is none, when it cannot be used.
    store: Result<MeterStore, String>,
    carry: Carry,
    reader: Reader,
    looked: Instant,
    host: Option<HostTimes>,
    energy: EnergyNow,
}

impl Meter {
    /// Opens the database. One that cannot be used costs the meter, not the node: it is said, and questions are refused.
    #[must_use]
    pub fn open(
        settings: MeterSettings,
        supervisor: Supervisor,
        holdings: watch::Receiver<Holdings>,
    ) -> Self {
        let opened = MeterStore::open(&settings.path).and_then(|store| Ok((store.carry()?, store)));
        let (carry, store) = match opened {
            Ok((carry, store)) => (carry, Ok(store)),
            Err(error) => {
                tracing::error!("nothing is metered: {}", chain(&error));
                (None, Err(chain(&error)))
            }
        };
        let carry = carry.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        let mut reader = Reader::new("/sys");
        // The first look is what the next is compared with.
        let _ = reader.sample(Duration::ZERO);
        let energy = EnergyNow {
            method: reader.method().map(crate::energy::Method::describe),
            carbon_grams_per_kwh: settings.energy.carbon_intensity(),
            ..EnergyNow::default()
        };
        let host = read::host_times("/".as_ref());
        let shown = Mutex::new(energy.clone());
        let now = Mutex::new(Now { store, carry, reader, looked: Instant::now(), host, energy });
        Self { inner: Arc::new(Inner { settings, supervisor, holdings, now, energy: shown }) }
    }

    /// Looks until the state ends.
    pub async fn run(self) {
        let mut tick = interval(self.inner.settings.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut holdings = self.inner.holdings.clone();
        loop {
            tick.tick().await;
            if holdings.has_changed().is_err() {
                return;
            }
            let held = holdings.borrow_and_update().clone();
            let inner = Arc::clone(&self.inner);
            let _ = tokio::task::spawn_blocking(move || inner.look(&held)).await;
        }
    }

    /// The host's energy.
    #[must_use]
    pub fn energy(&self) -> EnergyNow {
        self.inner.energy().clone()
    }

    /// What vdcs of a name used, by spans from a time to before another (seconds since 1970); looks first, so that it is of now.
    ///
    /// # Errors
    /// The database cannot be used.
    pub async fn usage(
        &self,
        name: Name,
        (from_s, to_s): (i64, i64),
        by: Granularity,
    ) -> Result<Vec<(Span, UsageRow)>, Error> {
        let hours = (from_s.div_euclid(3600), to_s.saturating_add(3599).div_euclid(3600));
        let held = self.inner.holdings.borrow().clone();
        let rows = self
            .on_store(move |inner| {
                inner.look(&held);
                inner.with_store(|store| store.hours(&name, hours.0, hours.1))
            })
            .await?;
        Ok(spans(&rows, by))
    }

    /// What each vdc used since it was made.
    ///
    /// # Errors
    /// The database cannot be used.
    pub async fn totals(&self) -> Result<Vec<UsageRow>, Error> {
        self.on_store(|inner| inner.with_store(|store| store.totals())).await
    }

    async fn on_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner)).await.unwrap_or(Err(Error::Ending))
    }
}

impl Inner {
    fn now(&self) -> MutexGuard<'_, Now> {
        // Values are replaced whole: a panic elsewhere leaves none half-written.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn energy(&self) -> MutexGuard<'_, EnergyNow> {
        self.energy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_store<T>(&self, ask: impl FnOnce(&MeterStore) -> Result<T, StoreError>) -> Result<T, Error> {
        let now = self.now();
        match &now.store {
            Ok(store) => Ok(ask(store)?),
            Err(why) => {
                let why =
                    format!("are not metered: {why}; move meter.db away and restart seriod to begin anew");
                Err(Error::precondition("vdcs", why))
            }
        }
    }

    fn look(&self, held: &Holdings) {
        let group_of = |vm: Uuid| self.supervisor.cgroup(vm);
        let mut now = self.now();
        let Some(look) = read::look("/".as_ref(), held, &group_of) else { return };
        let mut carry = now.carry.clone();
        let counted = count(&mut carry, &look);
        let mut used = counted.vdcs.clone();
        let energy = now.energy_of(&self.settings.energy, &counted);
        for (vdc, _, amounts) in &mut used {
            let more = energy.get(vdc).copied().unwrap_or_default();
            *amounts = amounts.plus(more);
        }
        let Ok(text) = serde_json::to_string(&carry) else { return };
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let hour = i64::try_from(seconds / 3600).unwrap_or(0);
        *self.energy() = now.energy.clone();
        let written = match &mut now.store {
            Ok(store) => store.add(hour, &used, &text),
            Err(_) => return,
        };
        match written {
            Ok(()) => now.carry = carry,
            // The carry stays: the next look counts this interval too.
            Err(error) => tracing::error!("a look of the meter was not written: {}", chain(&error)),
        }
    }
}

impl Now {
    /// Energy and carbon of each vdc since the last look.
    fn energy_of(&mut self, settings: &EnergySettings, counted: &Counted) -> BTreeMap<Uuid, Amounts> {
        let elapsed = self.looked.elapsed();
        self.looked = Instant::now();
        let times = read::host_times("/".as_ref());
        let before = std::mem::replace(&mut self.host, times);
        let carbon = settings.carbon_intensity();
        self.energy.carbon_grams_per_kwh = carbon;
        let (Some(sample), Some(then), Some(times)) = (self.reader.sample(elapsed), before, times) else {
            return BTreeMap::new();
        };
        let host = Host {
            capacity_us: times.capacity_us.saturating_sub(then.capacity_us),
            busy_us: times.busy_us.saturating_sub(then.busy_us),
            memory_bytes: times.memory_bytes,
        };
        let consumers: Vec<Consumer> = counted
            .vms
            .iter()
            .map(|&(_, vm, cpu_us, memory_bytes)| Consumer { vm, cpu_us, memory_bytes })
            .collect();
        let shares = share(sample, host, settings.memory_share, &consumers);
        let energy = &mut self.energy;
        energy.total_uj = energy.total_uj.saturating_add(sample.total_uj);
        energy.idle_uj = energy.idle_uj.saturating_add(shares.idle);
        energy.host_uj = energy.host_uj.saturating_add(shares.host);
        if !elapsed.is_zero() {
            energy.watts = Some(sample.total_uj as f64 / 1e6 / elapsed.as_secs_f64());
        }
        let mut by_vdc: BTreeMap<Uuid, u64> = BTreeMap::new();
        for ((vdc, ..), (_, uj)) in counted.vms.iter().zip(&shares.vms) {
            let sum = by_vdc.entry(*vdc).or_default();
            *sum = sum.saturating_add(*uj);
        }
        let vdcs = counted.vdcs.iter().map(|(vdc, ..)| {
            let uj = by_vdc.get(vdc).copied().unwrap_or(0);
            let amounts = Amounts {
                energy_mj: Some(uj / 1000),
                carbon_mg: carbon.map(|grams| carbon_mg(uj, grams)),
                ..Amounts::default()
            };
            (*vdc, amounts)
        });
        vdcs.collect()
    }
}

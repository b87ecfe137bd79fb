//! `vm disk` and `vm nic`: volumes and cards that a VM gets or gives back.

use std::time::Duration;

use serio_api::v1::{
    AttachNicRequest, AttachVolumeRequest, DetachNicRequest, DetachVolumeRequest, NicSpec,
    vm_service_client::VmServiceClient,
};

use super::request_id;
use crate::{
    args::{DiskVerb, Global, NicArg, NicVerb},
    client::Client,
    error::Failure,
    names,
    output::Output,
};

/// What a guest gets when nothing else is said; also the API's default.
const WAIT: Duration = Duration::from_secs(15);
/// The answer to a removal may come that much after the guest's time is over.
const MARGIN: Duration = Duration::from_secs(90);

pub(super) async fn disk(
    client: &Client,
    global: &Global,
    verb: DiskVerb,
    output: Output,
) -> Result<(), Failure> {
    match verb {
        DiskVerb::Add { name, volume } => {
            let request = AttachVolumeRequest {
                request_id: request_id(),
                name: names::vm(&name),
                volume: names::volume(&volume),
                ..Default::default()
            };
            let vm =
                client
                    .call(
                        &format!("attach volume {volume} to vm {name}"),
                        request,
                        |channel, request| async move {
                            VmServiceClient::new(channel).attach_volume(request).await
                        },
                    )
                    .await?;
            output.done(&vm, &format!("vm {name} has volume {volume}"))
        }
        DiskVerb::Remove { name, volume } => {
            let wait = global.timeout().unwrap_or(WAIT);
            let request = DetachVolumeRequest {
                request_id: request_id(),
                name: names::vm(&name),
                volume: names::volume(&volume),
                timeout: Some(pbjson_types::Duration::from(wait)),
                ..Default::default()
            };
            let vm =
                client
                    .clone()
                    .with_timeout(Some(wait.saturating_add(MARGIN)))
                    .call(
                        &format!("detach volume {volume} from vm {name}"),
                        request,
                        |channel, request| async move {
                            VmServiceClient::new(channel).detach_volume(request).await
                        },
                    )
                    .await?;
            output.done(&vm, &format!("vm {name} gave volume {volume} back"))
        }
    }
}

/// A card as typed.
pub(super) fn nic_spec(NicArg { mac, address, gateway }: NicArg) -> NicSpec {
    NicSpec { mac, address, gateway }
}

pub(super) async fn nic(
    client: &Client,
    global: &Global,
    verb: NicVerb,
    output: Output,
) -> Result<(), Failure> {
    match verb {
        NicVerb::Add { name, nic } => {
            let request = AttachNicRequest {
                request_id: request_id(),
                name: names::vm(&name),
                nic: Some(nic_spec(nic)),
                ..Default::default()
            };
            let what = format!("give vm {name} a card");
            let vm = client
                .call(&what, request, |channel, request| async move {
                    VmServiceClient::new(channel).attach_nic(request).await
                })
                .await?;
            let cards = vm.spec.as_ref().map(|spec| spec.nics.as_slice()).unwrap_or_default();
            let mac = cards.last().map(|nic| nic.mac.as_str()).unwrap_or_default();
            output.done(&vm, &format!("vm {name} has card {mac}"))
        }
        NicVerb::Remove { name, mac } => {
            let wait = global.timeout().unwrap_or(WAIT);
            let request = DetachNicRequest {
                request_id: request_id(),
                name: names::vm(&name),
                mac: mac.to_string(),
                timeout: Some(pbjson_types::Duration::from(wait)),
                ..Default::default()
            };
            let client = client.clone().with_timeout(Some(wait.saturating_add(MARGIN)));
            let what = format!("take card {mac} from vm {name}");
            let vm = client
                .call(&what, request, |channel, request| async move {
                    VmServiceClient::new(channel).detach_nic(request).await
                })
                .await?;
            output.done(&vm, &format!("vm {name} gave card {mac} back"))
        }
    }
}

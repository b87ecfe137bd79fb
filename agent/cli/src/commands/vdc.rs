//! `vdc`: the quota of a tenant.

use serio_api::v1::{
    CreateVdcRequest, DeleteVdcRequest, GetVdcRequest, ListVdcsRequest, Quota, UpdateVdcRequest, Vdc,
    vdc_service_client::VdcServiceClient,
};
use serio_types::Name;

use super::request_id;
use crate::{args::VdcVerb, client::Client, error::Failure, names, output, output::Output};

pub(super) async fn run(client: &Client, verb: VdcVerb, output: Output) -> Result<(), Failure> {
    match verb {
        VdcVerb::Create { name, quota } => {
            let quota = Quota {
                vcpus: quota.vcpus,
                memory_bytes: quota.memory.bytes(),
                storage_bytes: quota.storage.bytes(),
            };
            let request =
                CreateVdcRequest { request_id: request_id(), vdc_id: name.to_string(), quota: Some(quota) };
            let vdc = client
                .call(&format!("create vdc {name}"), request, |channel, request| async move {
                    VdcServiceClient::new(channel).create_vdc(request).await
                })
                .await?;
            output.done(&vdc, &format!("created vdc {name}: {}", quota_text(vdc.quota.as_ref())))
        }
        VdcVerb::List => {
            let answer = client
                .call("list the vdcs", ListVdcsRequest {}, |channel, request| async move {
                    VdcServiceClient::new(channel).list_vdcs(request).await
                })
                .await?;
            output.list(&answer.vdcs, &["NAME", "VCPUS", "MEMORY", "STORAGE", "CREATED"], row)
        }
        VdcVerb::Show { name } => show(&get(client, &name).await?, output),
        VdcVerb::Update { name, vcpus, memory, storage } => {
            let doing = format!("update vdc {name}");
            let now = get(client, &name).await?;
            let quota = now.quota.unwrap_or_default();
            let request = UpdateVdcRequest {
                request_id: request_id(),
                name: names::vdc(&name),
                quota: Some(Quota {
                    vcpus: vcpus.unwrap_or(quota.vcpus),
                    memory_bytes: memory.map_or(quota.memory_bytes, |m| m.bytes()),
                    storage_bytes: storage.map_or(quota.storage_bytes, |s| s.bytes()),
                }),
                // What is not named stays as it was read: nobody may have changed it in between.
                expected_generation: now.generation,
            };
            let vdc = client
                .call(&doing, request, |channel, request| async move {
                    VdcServiceClient::new(channel).update_vdc(request).await
                })
                .await?;
            output.done(&vdc, &format!("updated vdc {name}: {}", quota_text(vdc.quota.as_ref())))
        }
        VdcVerb::Delete { name } => {
            let request = DeleteVdcRequest { request_id: request_id(), name: names::vdc(&name) };
            let answer = client
                .call(&format!("delete vdc {name}"), request, |channel, request| async move {
                    VdcServiceClient::new(channel).delete_vdc(request).await
                })
                .await?;
            output.done(&answer, &format!("deleted vdc {name}"))
        }
    }
}

async fn get(client: &Client, name: &Name) -> Result<Vdc, Failure> {
    client
        .call(
            &format!("show vdc {name}"),
            GetVdcRequest { name: names::vdc(name) },
            |channel, request| async move { VdcServiceClient::new(channel).get_vdc(request).await },
        )
        .await
}

fn row(vdc: &Vdc) -> Vec<String> {
    let used = vdc.used.unwrap_or_default();
    let quota = vdc.quota.unwrap_or_default();
    vec![
        names::short(&vdc.name),
        format!("{}/{}", used.vcpus, quota.vcpus),
        format!("{}/{}", output::size(used.memory_bytes), output::size(quota.memory_bytes)),
        format!("{}/{}", output::size(used.storage_bytes), output::size(quota.storage_bytes)),
        output::time(vdc.create_time.as_ref()),
    ]
}

fn show(vdc: &Vdc, output: Output) -> Result<(), Failure> {
    let [name, vcpus, memory, storage, created] = row(vdc).try_into().unwrap_or_default();
    output.one(
        vdc,
        &[
            ("name", name),
            ("uid", vdc.uid.clone()),
            ("generation", vdc.generation.to_string()),
            ("created", created),
            ("vcpus", format!("{vcpus} used")),
            ("memory", format!("{memory} used")),
            ("storage", format!("{storage} used")),
        ],
    )
}

fn quota_text(quota: Option<&Quota>) -> String {
    let quota = quota.copied().unwrap_or_default();
    format!(
        "{} vcpus, {} memory, {} storage",
        quota.vcpus,
        output::size(quota.memory_bytes),
        output::size(quota.storage_bytes)
    )
}

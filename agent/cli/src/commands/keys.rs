//! The keys of encrypted vdcs: rotate, erase.

use serio_api::v1::{
    Encryption, EraseVdcRequest, Receipt, RotateVdcKeyRequest, vdc_service_client::VdcServiceClient,
};
use serio_types::Name;

use super::vdc;
use crate::{client::Client, error::Failure, names, output, output::Output};

/// As people say it.
pub(super) fn encryption(encryption: Encryption) -> &'static str {
    match encryption {
        Encryption::Unspecified | Encryption::Plain => "plain",
        Encryption::Encrypted => "encrypted",
        Encryption::Erased => "erased: they can only be deleted",
    }
}

fn in_log(receipt: Option<&Receipt>) -> String {
    let Some(receipt) = receipt else { return String::new() };
    format!(
        "\naudit log: line {}, {}, by {}, blake3 {}",
        receipt.number,
        output::time(receipt.time.as_ref()),
        output::clean(&receipt.who),
        receipt.hash
    )
}

pub(super) async fn rotate(client: &Client, name: &Name, output: Output) -> Result<(), Failure> {
    let request = RotateVdcKeyRequest { name: names::vdc(name), ..Default::default() };
    let done = client
        .call(&format!("rotate the key of vdc {name}"), request, |channel, request| async move {
            VdcServiceClient::new(channel).rotate_vdc_key(request).await
        })
        .await?;
    let sentence = format!(
        "wrapped key {} of vdc {name} anew: key encryption key {} before, {} now{}",
        done.key_id,
        done.from_kek,
        done.to_kek,
        in_log(done.receipt.as_ref())
    );
    output.done(&done, &sentence)
}

pub(super) async fn erase(client: &Client, name: &Name, output: Output) -> Result<(), Failure> {
    let uid = vdc::get(client, name).await?.uid;
    let request = EraseVdcRequest { name: names::vdc(name), uid: uid.clone(), ..Default::default() };
    let done = client
        .call(&format!("erase vdc {name}"), request, |channel, request| async move {
            VdcServiceClient::new(channel).erase_vdc(request).await
        })
        .await?;
    let sentence = format!(
        "erased vdc {name} ({uid}): key {} is destroyed, its wrapped file had blake3 {}{}",
        done.key_id,
        done.destroyed_blake3,
        in_log(done.receipt.as_ref())
    );
    output.done(&done, &sentence)
}

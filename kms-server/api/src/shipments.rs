//! `meterkms.v1.ShipmentService`.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt};
use kms_domain::PrincipalId;
use kms_proto::v1::{
    GetShipmentRequest, GetVendorTransportKeyRequest, ImportShipmentRequest, ImportShipmentResponse,
    ListShipmentsRequest, ListShipmentsResponse, Shipment, UploadShipmentRequest, UploadShipmentStart,
    VendorTransportKey, shipment_service_server::ShipmentService as Rpc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::shipment::{ShipmentService, UploadStart};

/// The service over gRPC.
pub(crate) struct ShipmentApi {
    island: Arc<IslandContext>,
    service: ShipmentService,
}

impl ShipmentApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: ShipmentService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl Rpc for ShipmentApi {
    async fn upload_shipment(
        &self,
        request: Request<Streaming<UploadShipmentRequest>>,
    ) -> Result<Response<Shipment>, Status> {
        let caller = self.caller(&request)?;
        let mut messages = request.into_inner();
        let first = messages.message().await?.ok_or_else(|| ServiceError::invalid("start", "no message was sent"))?;
        let start =
            parse_start(first.start.ok_or_else(|| {
                ServiceError::invalid("start", "it is missing: the first message must have `start`")
            })?)?;
        let mut upload = self.service.upload(&caller, start).await?;
        upload.append(first.offset, &first.octets).await?;
        loop {
            if upload.is_refused() {
                // The rest of the upload is not needed.
                return Ok(Response::new(upload.finish().await?));
            }
            match messages.message().await {
                Ok(None) => return Ok(Response::new(upload.finish().await?)),
                Ok(Some(UploadShipmentRequest { start: Some(_), .. })) => {
                    return Err(ServiceError::invalid("start", "only the first message may have it").into());
                }
                Ok(Some(message)) => upload.append(message.offset, &message.octets).await?,
                Err(broken) => {
                    // The sender can continue after the octets that have arrived.
                    upload.store().await?;
                    return Err(broken);
                }
            }
        }
    }

    type ImportShipmentStream = Pin<Box<dyn Stream<Item = Result<ImportShipmentResponse, Status>> + Send>>;

    async fn import_shipment(
        &self,
        request: Request<ImportShipmentRequest>,
    ) -> Result<Response<Self::ImportShipmentStream>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let head_end = match message.head_end.as_str() {
            "" => None,
            uri => Some(PrincipalId::parse(uri).map_err(ServiceError::parse("head_end"))?),
        };
        let import = self.service.import(&caller, &file_sha256(&message.file_sha256, "file_sha256")?, head_end).await?;
        let answers = ReceiverStream::new(import.into_receiver()).map(|answer| answer.map_err(Status::from));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn get_shipment(&self, request: Request<GetShipmentRequest>) -> Result<Response<Shipment>, Status> {
        let caller = self.caller(&request)?;
        let sha256 = file_sha256(&request.into_inner().file_sha256, "file_sha256")?;
        Ok(Response::new(self.service.get(&caller, &sha256).await?))
    }

    async fn list_shipments(
        &self,
        request: Request<ListShipmentsRequest>,
    ) -> Result<Response<ListShipmentsResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(ListShipmentsResponse { shipments: self.service.list(&caller).await? }))
    }

    async fn get_vendor_transport_key(
        &self,
        request: Request<GetVendorTransportKeyRequest>,
    ) -> Result<Response<VendorTransportKey>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.service.transport_key(&caller).await?))
    }
}

fn parse_start(start: UploadShipmentStart) -> Result<UploadStart, ServiceError> {
    Ok(UploadStart {
        file_sha256: file_sha256(&start.file_sha256, "start.file_sha256")?,
        file_length: start.file_length,
        signature: start.signature,
        manufacturer: PrincipalId::parse(&start.manufacturer).map_err(ServiceError::parse("start.manufacturer"))?,
    })
}

fn file_sha256(octets: &[u8], field: &str) -> Result<[u8; 32], ServiceError> {
    octets.try_into().map_err(|_| ServiceError::invalid(field, format!("{} octets instead of 32", octets.len())))
}

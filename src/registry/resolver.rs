//! Addresses of hosts: each is looked up by one thread at a time, and remembered for a while.
//!
//! The C library's look-up blocks and cannot be given up. A name that never resolves therefore
//! costs one thread, however many wait for it, and no other name waits behind it.

use super::flight::Flight;
use crate::limits::{ADDRESS_MS_MAX, REGISTRY_HOSTS_MAX};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What was found, or why nothing was.
type Found = Result<Vec<SocketAddr>, String>;

#[derive(Debug, Default)]
pub(super) struct Resolver {
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

#[derive(Debug, Default)]
struct Host {
    flight: Flight<Found>,
    last: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

impl Host {
    fn known(&self) -> Option<Vec<SocketAddr>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, found) = last.as_ref()?;
        (at.elapsed() < Duration::from_millis(ADDRESS_MS_MAX)).then(|| found.clone())
    }
}

impl Resolver {
    fn host(&self, name: &str) -> Arc<Host> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= REGISTRY_HOSTS_MAX && !hosts.contains_key(name) {
            // Forgetting all costs each one look-up; it takes many hosts to come here.
            hosts.clear();
        }
        Arc::clone(hosts.entry(name.to_owned()).or_default())
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let name = name.as_str().to_owned();
        let host = self.host(&name);
        Box::pin(async move {
            if let Some(known) = host.known() {
                return Ok(Box::new(known.into_iter()) as Addrs);
            }
            let found = host.flight.join(|| look_up(name)).await;
            match found {
                Some(Ok(found)) => {
                    let mut last = host.last.lock().unwrap_or_else(PoisonError::into_inner);
                    *last = Some((Instant::now(), found.clone()));
                    Ok(Box::new(found.into_iter()) as Addrs)
                }
                Some(Err(why)) => Err(why.into()),
                None => Err("the look-up was lost".into()),
            }
        })
    }
}

async fn look_up(name: String) -> Found {
    let looked_up = tokio::task::spawn_blocking(move || {
        // The port is replaced by the caller.
        let found = (name.as_str(), 0).to_socket_addrs().map_err(|error| error.to_string())?;
        Ok(found.collect())
    });
    looked_up.await.unwrap_or_else(|error| Err(error.to_string()))
}

#![allow(dead_code, unreachable_pub, clippy::all, clippy::print_stdout)]
#[path = "../src/agent.rs"] mod agent;
#[path = "../src/driver.rs"] mod driver;
#[path = "../src/floor.rs"] mod floor;
#[path = "../src/statistics.rs"] mod statistics;
use clap::Parser;
#[derive(Parser)] struct A { #[command(flatten)] c: wrenn_host_agent::Config, #[arg(long, default_value_t=20)] n: usize }
#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let a = A::parse();
    let images = wrenn_host_agent::images::Images::load(&a.c.images)?;
    
    struct U; impl U { fn name(&self) -> &str { "wt-scratch" } } let uplink = U;
    let mut c = a.c; c.uplink_netns = Some(uplink.name().parse()?); 
    let agent = wrenn_host_agent::Agent::start(c).await?;
    let shape = wrenn_types::Shape { vcpus: Default::default(), memory: Default::default() };
    let r = agent::prepare_template(agent.socket(), "base", shape).await;
    println!("{r:?}");
    if let Ok(p) = r {
        let vmm = driver::same_as(&p.directory).await?;
        let u = wrenn_host_agent::network::Uplink::Named(uplink.name().parse()?);
        let floor = std::sync::Arc::new(floor::Floor::new(vmm, images.guest().bundle.clone(), &p.directory, u, 8).await?);
        let mut s = statistics::Samples::default();
        for _ in 0..a.n { let r = floor.prepare().await?; let x = floor.restore(r).await; s.add(x.as_ref().map(|x| x.to_first_byte)); if let Ok(x) = x { floor.finish(x).await?; } }
        println!("series {:?} {:?}", s.summary(), s.failures());
        let mut s = statistics::Samples::default();
        for _ in 0..3 { let mut js = tokio::task::JoinSet::new(); let mut v=vec![]; for _ in 0..8 { v.push(floor.prepare().await?); }
            for r in v { let f = floor.clone(); js.spawn(async move { f.restore(r).await }); }
            for x in js.join_all().await { s.add(x.as_ref().map(|x| x.to_first_byte)); if let Ok(x) = x { floor.finish(x).await?; } } }
        println!("8 {:?} {:?}", s.summary(), s.failures());
        std::sync::Arc::into_inner(floor).unwrap().close().await;
    }
    agent.stop().await;
    Ok(())
}

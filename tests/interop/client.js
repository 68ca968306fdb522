// The npm package `socks`, the client behind Node's SOCKS agents. One job:
//
//   node client.js MODULE '{"proxy": {...}, "host": ..., "port": ..., "text": ...}'
//
// prints {"bound": the address in the reply, "heard": what came back} or {"error": message}.
const { SocksClient } = require(process.argv[2]);
const job = JSON.parse(process.argv[3]);

async function run() {
  const { socket, remoteHost } = await SocksClient.createConnection({
    proxy: job.proxy,
    command: "connect",
    destination: { host: job.host, port: job.port },
  });
  const heard = [];
  socket.on("data", (data) => heard.push(data));
  socket.resume();
  socket.end(job.text);
  await new Promise((resolve, reject) => socket.on("close", resolve).on("error", reject));
  return { bound: remoteHost, heard: Buffer.concat(heard).toString() };
}

run()
  .catch((error) => ({ error: error.message }))
  .then((answer) => console.log(JSON.stringify(answer)));

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.Authenticator;
import java.net.HttpURLConnection;
import java.net.InetSocketAddress;
import java.net.PasswordAuthentication;
import java.net.Proxy;
import java.net.Socket;
import java.net.URI;
import java.nio.charset.StandardCharsets;

/**
 * Java's own SOCKS client. Each line of standard input is a job, in words divided by tabs:
 *
 *   socks4|socks5|page  PROXY-PORT  USER  PASSWORD  HOST  PORT  TEXT-OR-PATH
 *
 * with an empty user for none. The answer is a line, "ok" and what came back, or the exception; divided by tabs too.
 * An address is given as such, a name is left for the proxy to resolve.
 */
class Client {
    public static void main(String[] args) throws IOException {
        BufferedReader jobs = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line; (line = jobs.readLine()) != null;) {
            String answer;
            try {
                answer = "ok\t" + run(line.split("\t", -1)).strip().replace("\n", "\t");
            } catch (Exception e) {
                answer = e.getClass().getName() + "\t" + e.getMessage();
            }
            System.out.println(answer);
            System.out.flush();
        }
    }

    static String run(String[] job) throws IOException {
        int proxyPort = Integer.parseInt(job[1]), port = Integer.parseInt(job[5]);
        String user = job[2], password = job[3], host = job[4], text = job[6];
        Authenticator.setDefault(user.isEmpty() ? null : new Authenticator() {
            @Override
            protected PasswordAuthentication getPasswordAuthentication() {
                return new PasswordAuthentication(user, password.toCharArray());
            }
        });
        Proxy proxy = new Proxy(Proxy.Type.SOCKS, new InetSocketAddress("127.0.0.1", proxyPort));
        boolean literal = host.contains(":") || host.matches("[0-9.]+");
        InetSocketAddress to =
            literal ? new InetSocketAddress(host, port) : InetSocketAddress.createUnresolved(host, port);
        switch (job[0]) {
            case "page":
                String authority = (host.contains(":") ? "[" + host + "]" : host) + ":" + port;
                HttpURLConnection page =
                    (HttpURLConnection) URI.create("http://" + authority + text).toURL().openConnection(proxy);
                return page.getHeaderField("Peer") + "\n"
                    + new String(page.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
            case "socks4":
            case "socks5":
                System.setProperty("socksProxyVersion", job[0].substring("socks".length()));
                try (Socket socket = new Socket(proxy)) {
                    return talk(socket, to, text);
                } finally {
                    System.clearProperty("socksProxyVersion");
                }
            default:
                throw new IllegalArgumentException(job[0]);
        }
    }

    static String talk(Socket socket, InetSocketAddress to, String text) throws IOException {
        socket.connect(to, 10_000);
        socket.getOutputStream().write(text.getBytes(StandardCharsets.UTF_8));
        socket.shutdownOutput();
        return new String(socket.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
    }
}

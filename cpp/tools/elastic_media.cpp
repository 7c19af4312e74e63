#include "elastic_media.h"

#include "arg.h"
#include "common.h"
#include "download.h"
#include "http.h"

#include <stdexcept>

#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#include "stb/stb_image.h"

#if defined(_WIN32)
#include <ws2tcpip.h>
#else
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#endif

enum class remote_media { as_upstream, none, is_public };

static struct {
    remote_media remote    = remote_media::as_upstream;
    int64_t      n_files   = 0;  // 0: no limit
    int64_t      n_mib     = 0;
    int64_t      n_mpixels = 0;
} limits;

static int64_t limit(const char * name, int value) {
    if (value < 0) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", expected >= 0");
    }
    return value;
}

void elastic_add_media_options(const std::function<void(common_arg)> & add) {
    const auto server = { LLAMA_EXAMPLE_SERVER };
    add(common_arg({ "--remote-media" }, { "--no-remote-media" },
                   "fetch images that a request names by an http URL from public addresses, following no redirection; or refuse such URLs "
                   "(default: fetched from anywhere)",
                   [](common_params &, bool value) { limits.remote = value ? remote_media::is_public : remote_media::none; })
            .set_examples(server)
            .set_env("LLAMA_ARG_REMOTE_MEDIA"));
    add(common_arg({ "--media-max-count" }, "N", "images, sounds and videos of one request at most (default: 0, no limit)",
                   [](common_params &, int value) { limits.n_files = limit("--media-max-count", value); })
            .set_examples(server)
            .set_env("LLAMA_ARG_MEDIA_MAX_COUNT"));
    add(common_arg({ "--media-max-mib" }, "N", "MiB of each of them at most (default: 0, no limit)",
                   [](common_params &, int value) { limits.n_mib = limit("--media-max-mib", value); })
            .set_examples(server)
            .set_env("LLAMA_ARG_MEDIA_MAX_MIB"));
    add(common_arg({ "--media-max-mpixels" }, "N", "millions of pixels of an image at most (default: 0, no limit)",
                   [](common_params &, int value) { limits.n_mpixels = limit("--media-max-mpixels", value); })
            .set_examples(server)
            .set_env("LLAMA_ARG_MEDIA_MAX_MPIXELS"));
}

//
// from where
//

static bool is_public(uint32_t ip) {  // in host order
    static const struct {
        uint32_t net;
        int      bits;
    } others[] = {
        { 0x00000000, 8 },  { 0x0a000000, 8 },  { 0x64400000, 10 }, { 0x7f000000, 8 },  { 0xa9fe0000, 16 },
        { 0xac100000, 12 }, { 0xc0000000, 24 }, { 0xc0000200, 24 }, { 0xc0586300, 24 }, { 0xc0a80000, 16 },
        { 0xc6120000, 15 }, { 0xc6336400, 24 }, { 0xcb007100, 24 }, { 0xe0000000, 3 },  // multicast and reserved
    };
    for (const auto & o : others) {
        if ((ip ^ o.net) >> (32 - o.bits) == 0) {
            return false;
        }
    }
    return true;
}

static bool is_public(const sockaddr * addr) {
    if (addr->sa_family == AF_INET) {
        return is_public(ntohl(reinterpret_cast<const sockaddr_in *>(addr)->sin_addr.s_addr));
    }
    if (addr->sa_family != AF_INET6) {
        return false;
    }
    const uint8_t * b          = reinterpret_cast<const sockaddr_in6 *>(addr)->sin6_addr.s6_addr;
    // global unicast is 2000::/3; of it, what carries an IPv4 address (6to4, Teredo) and documentation are left out
    const bool      is_special = (b[0] == 0x20 && b[1] == 0x02) || (b[0] == 0x20 && b[1] == 0x01 && b[2] < 2) ||
                            (b[0] == 0x20 && b[1] == 0x01 && b[2] == 0x0d && b[3] == 0xb8);
    return (b[0] & 0xe0) == 0x20 && !is_special;
}

// the address that a host has, if all that it has are public
static std::string public_address(const std::string & host) {
    addrinfo   hints  = {};
    addrinfo * found  = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0 || !found) {
        throw std::invalid_argument("the host of the media URL was not found: " + host);
    }
    char text[NI_MAXHOST] = "";
    bool ok               = getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) == 0;
    for (const addrinfo * a = found; a; a = a->ai_next) {
        ok = ok && is_public(a->ai_addr);
    }
    freeaddrinfo(found);
    if (!ok) {
        throw std::invalid_argument("the host of the media URL has a private address: " + host);
    }
    return text;
}

static std::pair<long, std::vector<char>> get_public(const std::string & url, const common_remote_params & params) {
    auto [cli, parts] = common_http_client(url);
    cli.set_hostname_addr_map({ { parts.host, public_address(parts.host) } });  // not looked up again
    cli.set_follow_location(false);
    if (params.timeout > 0) {
        cli.set_connection_timeout(params.timeout, 0);
        cli.set_read_timeout(params.timeout, 0);
        cli.set_write_timeout(params.timeout, 0);
    }
    std::vector<char> buf;
    const auto        res = cli.Get(parts.path, [&](const char * data, size_t n) {
        buf.insert(buf.end(), data, data + n);
        return params.max_size == 0 || buf.size() <= (size_t) params.max_size;
    });
    if (!res || res->status < 200 || res->status >= 300) {
        throw std::invalid_argument("the media URL could not be fetched: " + (res ? "status " + std::to_string(res->status) : url));
    }
    return { res->status, std::move(buf) };
}

std::pair<long, std::vector<char>> elastic_get_remote(const std::string & url, const common_remote_params & params) {
    if (limits.remote == remote_media::as_upstream) {
        return common_remote_get_content(url, params);
    }
    if (limits.remote == remote_media::none) {
        throw std::invalid_argument(
            "media URLs are not fetched by this server; send the data (data:image/png;base64,...), or start it with "
            "--remote-media");
    }
    try {
        return get_public(url, params);
    } catch (const std::runtime_error & e) {
        throw std::invalid_argument(e.what());
    }
}

//
// how much
//

static void check(const std::vector<uint8_t> & file) {
    if (limits.n_mib > 0 && (int64_t) file.size() > limits.n_mib * 1024 * 1024) {
        throw std::invalid_argument("media: got a file of " + std::to_string(file.size()) + " bytes, expected at most " +
                                    std::to_string(limits.n_mib) + " MiB");
    }
    int x = 0;
    int y = 0;
    int n = 0;
    if (limits.n_mpixels > 0 && stbi_info_from_memory(file.data(), (int) file.size(), &x, &y, &n) &&
        (int64_t) x * y > limits.n_mpixels * 1000 * 1000) {
        throw std::invalid_argument("media: got an image of " + std::to_string(x) + " x " + std::to_string(y) +
                                    " pixels, expected at most " + std::to_string(limits.n_mpixels) + " million");
    }
}

void elastic_check_media(const std::vector<std::vector<uint8_t>> & files) {
    if (limits.n_files > 0 && (int64_t) files.size() > limits.n_files) {
        throw std::invalid_argument("media: got " + std::to_string(files.size()) + " files in one request, expected at most " +
                                    std::to_string(limits.n_files));
    }
    for (const auto & file : files) {
        check(file);
    }
}

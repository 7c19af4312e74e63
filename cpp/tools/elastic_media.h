#pragma once

// What a server lets in as media: of which size, how many, and from where. Without options nothing is limited.

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

struct common_arg;
struct common_remote_params;

void elastic_add_media_options(const std::function<void(common_arg)> & add);

// common_remote_get_content, as far as the options allow: not at all, or from public addresses only, without redirections.
// Throws std::invalid_argument
std::pair<long, std::vector<char>> elastic_get_remote(const std::string & url, const common_remote_params & params);

// Throws std::invalid_argument where a request has too many files, or a file too many bytes or pixels
void elastic_check_media(const std::vector<std::vector<uint8_t>> & files);
